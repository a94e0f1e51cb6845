"""Commands that score draws and write them up."""

from pathlib import Path
from typing import Annotated

import typer

from hinge.cli.console import print_scores
from hinge.cli.options import RunFolder, open_folder
from hinge.utils.errors import ConfigError


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Folder of a run; or give --data.", show_default=False)
    ] = None,
    slide: Annotated[list[str] | None, typer.Option(help="Sample; repeat for several.  [default: test slides]")] = None,
    predictions: Annotated[
        list[str] | None,
        typer.Option(
            help="Predictions of another program: NAME[:UNITS]=FILE, or NAME=FILE,FILE,… with one draw a file; h5ad, "
            "CSV or TSV of spots × genes; {slide} is replaced by the slide's name."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Without a run: the data set.", show_default=False)] = None,
    sample: Annotated[list[str] | None, typer.Option(help="Without a run: a sample; repeat for several.")] = None,
    panel: Annotated[
        Path | None, typer.Option(help="Without a run: file of the genes to score.", show_default=False)
    ] = None,
    transform: Annotated[str | None, typer.Option(help="Without a run: log2p1 or log1p_cp10k.")] = None,
    gene_sets: Annotated[Path | None, typer.Option(help="Without a run: GMT or JSON file of gene sets.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the scores.")] = None,
) -> None:
    """Score draws, and predictions of other programs, beside baselines and the noise ceiling.

    Example: hinge evaluate runs/her2st --predictions stem=stem.h5ad. Without a run: hinge evaluate --data her2st
    --sample C5 --panel panel.json --transform log2p1 --predictions stem=stem.h5ad --output scores.json
    """
    opened = None if run is None else open_folder(run)
    from hinge.evaluation.predictions import PredictionFiles
    from hinge.run.evaluation import evaluate_files

    files = [PredictionFiles.parse(text) for text in predictions or []]
    alone = {
        "--data": data,
        "--sample": sample,
        "--panel": panel,
        "--transform": transform,
        "--gene-sets": gene_sets,
    }
    given = [name for name, value in alone.items() if value]
    if opened is not None:
        if given:
            raise ConfigError(f"{given[0]} is for scores without a run; leave out {run}, or that option")
        print_scores(opened.evaluate(slide, files, output))
        return
    needed = {**alone, "--predictions": files, "--output": output}
    missing = [name for name, value in needed.items() if not value and name != "--gene-sets"]
    if missing:
        raise ConfigError(f"without the folder of a run, {', '.join(missing)} must be given")
    if slide:
        raise ConfigError("--slide is for a run; name samples of --data with --sample")
    print_scores(evaluate_files(data, sample, panel, transform, files, output, gene_sets))


def report(
    run: RunFolder,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="A folder with the viewer instead, for any static web server.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With --interactive: the folder.  [default: RUN/viewer]")
    ] = None,
) -> None:
    """Write one self-contained HTML file: scores, maps, co-expression, calibration.

    Example: hinge report runs/her2st. The viewer as a folder: hinge report runs/her2st --interactive --output site
    """

    opened = open_folder(run)
    if interactive:
        from hinge.viewer import write_viewer

        print(f"viewer: {write_viewer(opened, output)}")
        return
    if output is not None:
        raise ConfigError("--output is for --interactive; the report is written into the run's folder")
    from hinge.report import report_run

    print(f"report: {report_run(opened)}")
