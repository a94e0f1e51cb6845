"""Write a folder that Vitessce opens: a view configuration, the draws as AnnData Zarr, and the image as OME-Zarr."""

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import zarr
from anndata import AnnData
from numpy.typing import NDArray
from PIL import Image

from hinge.data.slide import slide_name
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path

ADDRESS = "http://127.0.0.1:8000"
"""Where the folder is served by default."""

_VERSION = "1.0.17"  # of the schema of view configurations
_CHUNK_GENES, _CHUNK_PX = 8, 512
_SMALLEST_PX = 256  # of a level of the image
_TYPES = {"mean": "X", "standard deviation": "layers/std"}


def write_vitessce(draws: AnnData, path: str | Path, genes: list[str] | None = None, url: str = ADDRESS) -> Path:
    """Write a folder with `vitessce.json`, `draws.zarr` (mean and SD of the draws) and `image.ome.zarr`.

    Any static web server that allows other origins can serve the folder; Vitessce then opens
    `https://vitessce.io/#?url=<url>/vitessce.json`.

    Parameters
    ----------
    draws
        One slide's draws, with an image in `uns["spatial"]`.
    path
        Folder to write; an existing one is replaced.
    genes
        Genes to write, of which the first is shown; None for all, and the one whose mean varies most.
    url
        Address at which the folder is served.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    DataError
        The draws lack a gene or an image.
    """
    name = slide_name(draws)
    library: dict[str, Any] = next(iter(draws.uns.get("spatial", {}).values()), {})
    if "hires" not in library.get("images", {}):
        raise DataError(f"the draws of {name} hold no image in uns['spatial'], which Vitessce shows")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url takes an address such as {ADDRESS}, not {url!r}")
    missing = [gene for gene in genes or [] if gene not in draws.var_names]
    if missing:
        raise DataError(f"the draws of {name} lack {', '.join(missing[:5])}")
    chosen = draws[:, genes] if genes else draws
    mean, std = np.asarray(chosen.X, dtype=np.float32), np.asarray(chosen.layers["std"], dtype=np.float32)
    # Vitessce's scale bar takes a unit of its plane for 1 µm
    um_per_px = float(draws.uns["hinge"]["um_per_px"])
    table = AnnData(
        mean, obsm={"spatial": (np.asarray(chosen.obsm["spatial"]) * um_per_px).astype("f4")}, layers={"std": std}
    )
    table.obs_names, table.var_names = chosen.obs_names, chosen.var_names
    first = table.var_names[0 if genes else int(mean.var(axis=0).argmax())]
    radius = float(library["scalefactors"]["spot_diameter_fullres"]) / 2 * um_per_px
    with atomic_path(path) as temporary:
        # version 2 of the format of Zarr, which all releases of Vitessce read
        with anndata.settings.override(zarr_write_format=2):
            table.write_zarr(temporary / "draws.zarr", chunks=(table.n_obs, min(_CHUNK_GENES, table.n_vars)))
        pixel_um = um_per_px / float(library["scalefactors"]["tissue_hires_scalef"])
        _write_image(temporary / "image.ome.zarr", np.asarray(library["images"]["hires"]), pixel_um, name)
        config = _view_config(name, url.rstrip("/"), first, radius)
        (temporary / "vitessce.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return Path(path)


def _write_image(path: Path, image: NDArray[np.uint8], pixel_um: float, name: str) -> None:
    """Write an image as OME-Zarr 0.4 with the size of its pixels in µm."""
    group, datasets = zarr.open_group(path, mode="w", zarr_format=2), []
    level, pixels = 0, Image.fromarray(image)
    while level == 0 or max(pixels.size) >= _SMALLEST_PX:
        values = np.moveaxis(np.asarray(pixels.convert("RGB")), -1, 0)
        array = group.create_array(
            str(level),
            shape=values.shape,
            chunks=(1, _CHUNK_PX, _CHUNK_PX),
            dtype="uint8",
            chunk_key_encoding={"name": "v2", "separator": "/"},
        )
        array[:] = values
        factors = [1.0, image.shape[0] / pixels.height, image.shape[1] / pixels.width]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": factors}]})
        pixels, level = pixels.reduce(2), level + 1
    space = {"type": "space", "unit": "micrometer"}
    axes = [{"name": "c", "type": "channel"}, {"name": "y", **space}, {"name": "x", **space}]
    # of all levels: Vitessce reads this one, and none of the levels' own
    shared = [{"type": "scale", "scale": [1.0, pixel_um, pixel_um]}]
    window = {"start": 0, "end": 255, "min": 0, "max": 255}
    channels = [
        {"label": label, "color": colour, "window": window, "active": True}
        for label, colour in (("R", "FF0000"), ("G", "00FF00"), ("B", "0000FF"))
    ]
    levels = {"axes": axes, "datasets": datasets, "coordinateTransformations": shared}
    group.attrs["multiscales"] = [{"version": "0.4", "name": name, **levels}]
    group.attrs["omero"] = {"name": name, "version": "0.4", "channels": channels, "rdefs": {"model": "color"}}


def _view_config(name: str, url: str, gene: str, radius: float) -> dict[str, Any]:
    """Return a view configuration: mean and standard deviation side by side, with one gene and one zoom."""
    files: list[dict[str, Any]] = [
        {
            "fileType": "anndata.zarr",
            "url": f"{url}/draws.zarr",
            "options": {"obsFeatureMatrix": {"path": path}, "obsSpots": {"path": "obsm/spatial"}},
            "coordinationValues": {"obsType": "spot", "featureType": "gene", "featureValueType": kind},
        }
        for kind, path in _TYPES.items()
    ]
    files.append(
        {
            "fileType": "image.ome-zarr",
            "url": f"{url}/image.ome.zarr",
            "coordinationValues": {"fileUid": "histology"},
        }
    )
    shared = {
        "dataset": {"A": "A"},
        "obsType": {"A": "spot"},
        "featureType": {"A": "gene"},
        "featureValueType": dict(zip("AB", _TYPES, strict=True)),
        "featureSelection": {"A": [gene]},
        "obsColorEncoding": {"A": "geneSelection"},
        "spatialSpotRadius": {"A": radius},
        "fileUid": {"A": "histology"},
        "photometricInterpretation": {"A": "RGB"},
        "imageLayer": {"A": "__dummy__"},
        "spotLayer": {"A": "__dummy__", "B": "__dummy__"},
        "spatialZoom": {"A": None},
        "spatialTargetX": {"A": None},
        "spatialTargetY": {"A": None},
        "metaCoordinationScopes": {key: {"imageLayer": ["A"], "spotLayer": [key]} for key in "AB"},
        "metaCoordinationScopesBy": {
            key: {
                "imageLayer": {"fileUid": {"A": "A"}, "photometricInterpretation": {"A": "A"}},
                "spotLayer": {
                    **{scope: {key: "A"} for scope in ("obsType", "featureType", "featureSelection")},
                    **{scope: {key: "A"} for scope in ("obsColorEncoding", "spatialSpotRadius")},
                    "featureValueType": {key: key},
                },
            }
            for key in "AB"
        },
    }
    base = {"dataset": "A", "obsType": "A", "featureType": "A", "featureSelection": "A"}
    view = {"spatialZoom": "A", "spatialTargetX": "A", "spatialTargetY": "A"}
    titles = {key: f"{kind} of the draws".capitalize() for key, kind in zip("AB", _TYPES, strict=True)}
    layout = [
        {
            "component": component,
            **({"props": {"title": titles[key]}} if component == "spatialBeta" else {}),
            "coordinationScopes": {
                **base,
                "featureValueType": key,
                "metaCoordinationScopes": [key],
                "metaCoordinationScopesBy": [key],
                **(view if component == "spatialBeta" else {}),
            },
            **place,
        }
        for component, key, place in (
            ("spatialBeta", "A", {"x": 0, "y": 0, "w": 5, "h": 12}),
            ("spatialBeta", "B", {"x": 5, "y": 0, "w": 5, "h": 12}),
            ("layerControllerBeta", "A", {"x": 10, "y": 0, "w": 2, "h": 5}),
        )
    ]
    genes = {**base, "featureValueType": "A", "obsColorEncoding": "A"}
    layout.append({"component": "featureList", "coordinationScopes": genes, "x": 10, "y": 5, "w": 2, "h": 7})
    return {
        "version": _VERSION,
        "name": f"{name}: mean and standard deviation of the draws",
        "description": "",
        "datasets": [{"uid": "A", "name": name, "files": files}],
        "coordinationSpace": shared,
        "layout": layout,
        "initStrategy": "auto",
    }
