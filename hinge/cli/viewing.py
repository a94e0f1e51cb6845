"""Commands that show draws or write them for other tools."""

from pathlib import Path
from typing import Annotated

import typer

from hinge.cli.options import RunFolder, open_folder
from hinge.utils.errors import ConfigError


def view(
    run: RunFolder,
    slide: Annotated[list[str] | None, typer.Option(help="Sample to show; repeat for several.  [default: all]")] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 for any free port.", min=0, max=65535)] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address; do not open a browser.")] = False,
) -> None:
    """Show draws in the browser: full-resolution H&E, spots coloured by any gene, layers side by side.

    Example: hinge view runs/her2st
    """
    opened = open_folder(run)
    from hinge.viewer import Viewer, serve

    serve(Viewer(opened, slide), port, browser=not no_browser)


def export(
    run: RunFolder,
    format: Annotated[
        str,
        typer.Option(
            help="geojson (QuPath), spatialdata, cellxgene, vitessce, zarr or torch-export.", show_default=False
        ),
    ],
    slide: Annotated[list[str] | None, typer.Option(help="Sample; repeat for several.  [default: test slides]")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File or folder to write, for one slide.")
    ] = None,
    gene: Annotated[
        list[str] | None, typer.Option(help="geojson, vitessce: gene to write; repeat for several.  [default: all]")
    ] = None,
    full_image: Annotated[
        bool, typer.Option("--full-image", help="spatialdata: write the image at full resolution.")
    ] = False,
    metadata: Annotated[Path | None, typer.Option(help="cellxgene: YAML file of ontology terms.")] = None,
    gene_ids: Annotated[Path | None, typer.Option(help="cellxgene: table of symbols and Ensembl ids.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="geojson: write the share of draws above this value, in transform units.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="vitessce: where the folder will be served.  [default: http://127.0.0.1:8000]")
    ] = None,
) -> None:
    """Write draws for other tools; scanpy and squidpy read RUN/samples/NAME.h5ad without an export.

    torch-export writes the denoiser instead of draws: one step, as a program for torch.export.load.

    Example: hinge export runs/her2st --slide C5 --format geojson --gene ERBB2
    """
    opened = open_folder(run)
    from hinge.sharing.export import export_denoiser, export_draws

    if format == "torch-export":
        print(f"{format}: {export_denoiser(opened, output)}")
        return
    names = slide or opened.config.data.test
    if not names:
        raise ConfigError("the run names no test slides; give --slide")
    if output is not None and len(names) > 1:
        raise ConfigError("--output takes one slide; leave it out for several")
    for name in names:
        written = export_draws(
            opened, name, format, output, gene, full_image, metadata, gene_ids, threshold=threshold, url=url
        )
        print(f"{format}: {written}")
