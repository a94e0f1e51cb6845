"""Commands that draw expression."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hinge.cli.options import Allow, Ray, RunFolder, SpotSide, Workers, as_cluster, existing, open_folder
from hinge.utils.errors import ConfigError


def sample(
    run: RunFolder,
    slide: Annotated[
        list[str] | None,
        typer.Option(help="Sample of the run's data set, or path of another slide.  [default: test slides]"),
    ] = None,
    draws: Annotated[int | None, typer.Option(help="Draws a spot.  [default: the run's]", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of revealing genes.  [default: the run's]", min=1)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the draws.  [default: the run's]", min=0, max=2**32 - 1)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Spot-draws in one forward pass; no effect on the draws.", min=1)
    ] = None,
    um_per_px: Annotated[
        float | None, typer.Option(help="µm per pixel, where the file of another slide does not state it.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image, where a slide from elsewhere does not name it.")] = None,
    spot_um: SpotSide = None,
    observed: Annotated[
        Path | None,
        typer.Option(help="h5ad with measured genes; the other genes are drawn given them.", show_default=False),
    ] = None,
    bulk: Annotated[
        Path | None,
        typer.Option(
            help="Bulk profile of the section, block or patient: table of gene and counts or TPM, or h5ad.",
            show_default=False,
        ),
    ] = None,
    bulk_sd: Annotated[
        float | None, typer.Option(help="Platform effect of each gene of --bulk, SD of log2.  [default: 0.5]", min=0)
    ] = None,
    library_size: Annotated[
        str | None,
        typer.Option(
            help="Mean count of a spot over all genes to draw at: a number, slide, training or unknown.  [default: the "
            "patient's slides; of a new patient the slide's own, or training without counts]",
        ),
    ] = None,
    patient: Annotated[
        str | None, typer.Option(help="Patient of the slide.  [default: as the data set names it, or a new one]")
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            help="TOKEN=CATEGORY, for example organ=breast, or TOKEN=unknown; repeat for several.  [default: as the "
            "slide's metadata say]",
            show_default=False,
        ),
    ] = None,
    genes: Annotated[
        Path | None,
        typer.Option(
            help="File of genes outside the panel that the backbone knows; they are drawn too, into another file.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="h5ad to write, for one slide.")] = None,
    allow: Allow = None,
    ray: Ray = None,
    workers: Workers = None,
) -> None:
    """Draw the expression of every spot of a slide, several times.

    Another slide may be an H&E image without counts: its tissue is detected and covered by a grid of spots with the
    pitch of the training slides.

    Example: hinge sample runs/her2st --slide C5 --draws 20 --steps 20 --seed 0, or: hinge sample runs/her2st --slide
    biopsy.svs
    """
    from hinge.data.checks import require_codes
    from hinge.data.panel import read_panel
    from hinge.tasks.many_slides import open_sampling
    from hinge.utils.parallel import each_slide

    cluster = as_cluster(ray, workers)
    opened = open_folder(run, trained=True)
    names = slide or opened.config.data.test
    if not names:
        raise ConfigError("the run names no test slides; give --slide")
    if output is not None and len(names) > 1:
        raise ConfigError("--output takes the draws of one slide; leave it out for several")
    if observed is not None and len(names) > 1:
        raise ConfigError("--observed takes measurements of one slide; leave it out for several")
    if bulk is not None and len(names) > 1:
        raise ConfigError("--bulk is of one slide; name it with --slide")
    if image is not None and len(names) > 1:
        raise ConfigError("--image is the image of one slide; name it with --slide")
    require_codes(allow or ())
    outside = None if genes is None else read_panel(genes).genes
    categories = opened.tokens.checked_list(condition or [])
    open_worker = partial(
        open_sampling,
        run,
        image,
        um_per_px,
        spot_um,
        output=output,
        draws=draws,
        steps=steps,
        seed=seed,
        batch_size=batch_size,
        observed=observed,
        genes=outside,
        allow=tuple(allow or ()),
        patient=patient,
        bulk=bulk,
        bulk_sd=bulk_sd,
        library_size=_number_or_name(library_size),
        condition=categories,
    )
    for _, written in each_slide(names, open_worker, opened.folder / "samples", cluster):
        print(f"draws: {written[0]}")


def adapt(
    run: RunFolder,
    slide: Annotated[str, typer.Option(help="Sample of the run's data set.", show_default=False)],
    observed: Annotated[
        Path, typer.Option(help="h5ad with the measured counts of some of its spots.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the new run, which must not exist.", show_default=False)
    ],
    library_size: Annotated[
        float | None, typer.Option(help="Mean count of a spot over all genes, if it is known.", min=1)
    ] = None,
    patient: Annotated[str | None, typer.Option(help="Patient of the slide.  [default: as the data set names it]")] = (
        None
    ),
) -> None:
    """Adapt a run to a slide by some measured spots: its level and its regression, in seconds, as a run of its own.

    Example: hinge adapt runs/her2st --slide B4 --observed B4-spots.h5ad --output runs/her2st-B4
    """
    from hinge.tasks.adapt import adapt_run

    print(f"run: {adapt_run(open_folder(run, trained=True), slide, observed, output, patient, library_size)}")


def _number_or_name(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def map_expression(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Folder of a run, or of a fold of finetune-encoder.", show_default=False),
    ],
    slide: Annotated[
        list[str],
        typer.Option(help="Sample, or path of an image; repeat for several.", show_default=False),
    ],
    pitch_um: Annotated[float, typer.Option(help="Distance between the points of the map, µm.")] = 25.0,
    method: Annotated[str, typer.Option(help="regression (ridge on features) or draws (of the trained run).")] = (
        "regression"
    ),
    gene: Annotated[
        list[str] | None,
        typer.Option(help="Gene in the image; repeat for several.  [default: ten of the panel]"),
    ] = None,
    draws: Annotated[int | None, typer.Option(help="Draws a point.  [default: the run's]", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of revealing genes.  [default: the run's]", min=1)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the draws.  [default: the run's]", min=0, max=2**32 - 1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Patches in one forward pass.", min=1)] = 64,
    um_per_px: Annotated[float | None, typer.Option(help="µm per pixel, where the image does not state it.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder.  [default: RUN/maps]")] = None,
    ray: Ray = None,
    workers: Workers = None,
) -> None:
    """Predict expression on a grid finer than the spots, over all tissue: an h5ad, and an OME-TIFF of some genes.

    Example: hinge map runs/her2st --slide C5 --pitch-um 25 --gene ERBB2 --gene CD74
    """
    existing(run)
    from hinge.tasks.many_slides import open_maps
    from hinge.utils.parallel import each_slide, require_one_process

    cluster = as_cluster(ray, workers)
    require_one_process("hinge map")
    open_worker = partial(
        open_maps,
        run,
        output or run / "maps",
        um_per_px,
        pitch_um,
        gene,
        batch_size,
        method=method,
        draws=draws,
        steps=steps,
        seed=seed,
    )
    for _, written in each_slide(slide, open_worker, output or run / "maps", cluster):
        for what, path in zip(("map", "image"), written, strict=True):
            print(f"{what}: {path}")
