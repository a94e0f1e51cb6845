"""Layers for napari: the image of a slide, and its spots coloured by mean, standard deviation and one draw of a gene.

python examples/napari_layers.py DRAWS.h5ad GENE [--show]
"""

import sys

import anndata
import numpy as np


# --8<-- [start:layers]
def layers(draws: anndata.AnnData, gene: str) -> list[tuple[np.ndarray, dict, str]]:
    """Return data, attributes and kind of each layer, which `napari.layers.Layer.create` takes; lengths are µm."""
    library = next(iter(draws.uns["spatial"].values()))
    um_per_px, factors = float(draws.uns["hinge"]["um_per_px"]), library["scalefactors"]
    pixel_um = um_per_px / factors["tissue_hires_scalef"]
    found = [(library["images"]["hires"], {"name": "H&E", "rgb": True, "scale": (pixel_um, pixel_um)}, "image")]
    places = np.asarray(draws.obsm["spatial"])[:, ::-1] * um_per_px  # rows, columns
    column = draws.var_names.get_loc(gene)
    for layer in (None, "std", "draw_000"):
        values = np.asarray(draws.X if layer is None else draws.layers[layer])[:, column]
        name = f"{gene}, {layer or 'mean'}"
        look = {"size": factors["spot_diameter_fullres"] * um_per_px, "visible": layer is None}
        colours = {"face_color": "value", "face_colormap": "viridis", "border_width": 0}
        found.append((places, {"name": name, "features": {"value": values}, **look, **colours}, "points"))
    return found


# --8<-- [end:layers]


def main(path: str, gene: str, show: bool) -> None:
    found = layers(anndata.read_h5ad(path), gene)
    for data, attributes, kind in found:
        print(f"{kind} {attributes['name']}: {data.shape}")
    if show:
        import napari

        viewer = napari.Viewer()
        for layer in found:
            viewer.add_layer(napari.layers.Layer.create(*layer))
        viewer.scale_bar.visible = True
        napari.run()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--show" in sys.argv[3:])
