"""Commands that read slides: features, gene panels, downloads."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hinge.cli.options import Allow, DataSet, Ray, SpotSide, Workers, as_cluster, existing
from hinge.config import FeaturesConfig, PanelConfig
from hinge.models.options import DEFAULT_TRANSFORM
from hinge.utils.errors import ConfigError

_FEATURES, _PANEL = FeaturesConfig(), PanelConfig()


def features(
    data: DataSet,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the feature files.", show_default=False)],
    sample: Annotated[list[str] | None, typer.Option(help="Sample of the data set; repeat for several.")] = None,
    encoder: Annotated[
        str,
        typer.Option(
            help="efficientnet-lite0, stain-texture, published name (hinge doctor), timm or hf-hub: name, checkpoint; "
            "+ concatenates several."
        ),
    ] = _FEATURES.encoder,
    pooling: Annotated[str | None, typer.Option(help="stages: mean of every stage of a network.")] = _FEATURES.pooling,
    patch_um: Annotated[float | None, typer.Option(help="Side of a patch in µm.  [default: the encoder's]")] = None,
    views: Annotated[int, typer.Option(help="1, or 8 for all flips and quarter turns.")] = _FEATURES.views,
    batch_size: Annotated[int, typer.Option(help="Patches in one forward pass; no effect on the features.")] = 64,
    image: Annotated[Path | None, typer.Option(help="Full-resolution image, where the slide does not name it.")] = None,
    um_per_px: Annotated[float | None, typer.Option(help="µm per pixel, where the slide does not state it.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace feature files that other settings made.")
    ] = False,
    spot_um: SpotSide = None,
    allow: Allow = None,
    ray: Ray = None,
    workers: Workers = None,
) -> None:
    """Extract histology features, one patch a spot, into one HDF5 file a slide.

    Example: hinge features her2st --sample C5 --encoder stain-texture --output features
    """
    existing(data)
    from hinge.data.checks import require_codes
    from hinge.data.readers import require_samples
    from hinge.tasks.many_slides import open_features
    from hinge.utils.parallel import each_slide, require_one_process

    cluster = as_cluster(ray, workers)
    require_one_process("hinge features")
    require_codes(allow or ())
    names = require_samples(data, sample)
    if image is not None and len(names) > 1:
        raise ConfigError("--image is the image of one slide; name the slide with --sample")
    open_worker = partial(
        open_features,
        data,
        output,
        encoder,
        pooling,
        image,
        um_per_px,
        spot_um,
        tuple(allow or ()),
        patch_um,
        views=views,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    for _, written in each_slide(names, open_worker, output, cluster):
        print(f"features: {written[0]}")


def panel(
    data: DataSet,
    output: Annotated[Path, typer.Option("--output", "-o", help="panel.json to write.", show_default=False)],
    sample: Annotated[list[str] | None, typer.Option(help="Training sample; repeat for several.")] = None,
    method: Annotated[
        str, typer.Option(help="hmhvg, hvg, or union for genes that some slides may lack.")
    ] = _PANEL.method,
    genes: Annotated[
        int | None, typer.Option(help="Number of genes.  [default: 200; of union all]", show_default=False)
    ] = None,
    min_slides: Annotated[
        int | None,
        typer.Option(
            help="Smallest number of samples that have a gene, with --method union or --list.  "
            "[default: 1 with union, all with --list]",
            show_default=False,
        ),
    ] = None,
    from_list: Annotated[Path | None, typer.Option("--list", help="Text file of the genes, one symbol a line.")] = None,
    spot_um: SpotSide = None,
) -> None:
    """Choose the genes to predict, from training slides only.

    Example: hinge panel her2st --sample C2 --sample C3 --sample C4 --genes 200 --output panel.json
    """
    existing(data)
    from hinge.data.panel import read_panel, select_panel
    from hinge.data.readers import read_slide, require_samples
    from hinge.data.spots import load_spots

    names = require_samples(data, sample)
    slides = [read_slide(data, name, require_image=False, spot_um=spot_um) for name in names]
    if from_list is None:
        if min_slides is not None and method != "union":
            raise ConfigError(f"--min-slides goes with --method union or --list, not with --method {method}")
        number = _PANEL.genes if genes is None and method != "union" else genes
        chosen = select_panel(slides, method, number, 1 if min_slides is None else min_slides)
    elif min_slides is not None:
        chosen = read_panel(from_list).of_slides(slides, min_slides)
    else:
        chosen = read_panel(from_list)
        for slide in slides:
            # an error names the genes that a slide lacks
            load_spots(slide, chosen, DEFAULT_TRANSFORM, lacking="mask" if chosen.shares else "error")
    print(f"panel: {chosen.save(output)} ({len(chosen.genes)} genes)")


def download_hest(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the samples.", show_default=False)],
    id: Annotated[list[str] | None, typer.Option("--id", help="Sample; repeat for several.")] = None,
    organ: Annotated[
        list[str] | None, typer.Option(help="Only samples of this organ, e.g. Breast; repeat for several.")
    ] = None,
    oncotree: Annotated[
        list[str] | None, typer.Option(help="Only samples with this OncoTree code, e.g. IDC; repeat for several.")
    ] = None,
    technology: Annotated[
        list[str] | None, typer.Option(help="Only samples of this technology, e.g. Visium; repeat for several.")
    ] = None,
    species: Annotated[
        list[str] | None, typer.Option(help="Only samples of this species, e.g. 'Homo sapiens'; repeat for several.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="CSV table of HEST-1k's samples.  [default: downloaded from the hub]")
    ] = None,
    only_list: Annotated[bool, typer.Option("--list", help="List the samples, download nothing.")] = False,
) -> None:
    """Download samples of HEST-1k: counts, whole-slide images and metadata. Needs access granted on the hub.

    Example: hinge download hest --oncotree IDC --technology Visium --output hest
    """
    from hinge.data.hest_download import download_sample_table, download_samples, read_sample_table, select_samples

    samples = select_samples(
        read_sample_table(table or download_sample_table(output)),
        ids=id or (),
        organ=organ or (),
        oncotree=oncotree or (),
        technology=technology or (),
        species=species or (),
    )
    if only_list:
        columns = ["id", "organ", "oncotree_code", "species", "st_technology", "spots_under_tissue", "nb_genes"]
        print(samples[columns].to_string(index=False))
        return
    print(f"samples: {download_samples(list(samples['id']), output)} ({len(samples)})")
