"""The command line. Each command parses, then calls one function; heavy imports wait until then."""

import logging
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from hinge.utils.errors import ConfigError, HingeError, Interrupted
from hinge.utils.threads import prepare_cpu


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which then tidies up as Ctrl-C does."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


class _Commands(typer.core.TyperGroup):
    """Commands that say how to go on when they are stopped; typer would say "Aborted"."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except KeyboardInterrupt as stop:
            number = signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT
            raise Interrupted("stopped; what is finished is kept", number) from None


app = typer.Typer(
    name="hinge",
    cls=_Commands,
    help="Spatial gene expression from histology: draws of every spot's expression from an H&E slide.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

download = typer.Typer(help="Download slides.", no_args_is_help=True)
app.add_typer(download, name="download")

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML file of a run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings, e.g. training.epochs=10.", show_default=False),
]


def main() -> None:
    """Entry point: errors a user can cause become one sentence and exit code 2; a signal, its number and 128."""
    prepare_cpu()
    signal.signal(signal.SIGTERM, _terminate)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hinge").setLevel(logging.INFO)
    # libraries announce themselves on every start; what matters comes as an exception
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):
        os.environ.setdefault(name, value)
    # hinge says so itself, in a sentence that names the first of them
    warnings.filterwarnings("ignore", "(Observation|Variable) names are not unique")
    warnings.filterwarnings("ignore", "User provided device_type of 'cuda'")  # older diffusers, on import
    try:
        app()
    except Interrupted as error:
        if int(os.environ.get("RANK", 0)) == 0:
            launcher = "accelerate launch … -m hinge.cli.app" if "WORLD_SIZE" in os.environ else "hinge"
            print("hinge:", error, file=sys.stderr)
            print("hinge: continue with:", launcher, shlex.join(sys.argv[1:]), file=sys.stderr)
        sys.exit(128 + error.signal_number)
    except HingeError as error:
        # libraries whose words are passed on may take several lines
        print("hinge:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:  # a full disk, a folder in place of a file, no permission
        print("hinge:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)


def _run(config: Path, overrides: list[str] | None):
    from hinge.config import load_config
    from hinge.run.run import Run

    return Run(load_config(config, overrides))


def _print_scores(path: Path) -> None:
    from rich.console import Console

    from hinge.evaluation.scores import scores_table
    from hinge.utils.files import read_json

    console = Console()
    # a pipe has no width: give the table the room it needs
    console = console if console.is_terminal else Console(width=240)
    scores = read_json(path)
    console.print(scores_table(scores["rows"], scores["attained"]))
    print(f"scores: {path}")


def _print_rows(path: Path) -> None:
    """Rows of a file of scores as a table."""
    from rich.console import Console
    from rich.table import Table

    from hinge.utils.files import read_json

    console = Console()
    console = console if console.is_terminal else Console(width=240)
    rows = read_json(path)["rows"]
    table = Table(*(str(key) for key in rows[0]))
    for row in rows:
        cells = ("–" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    console.print(table)
    print(f"scores: {path}")


@app.command()
def features(
    path: Annotated[Path, typer.Argument(help="Slide or data set.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the feature files.", show_default=False)],
    sample: Annotated[list[str] | None, typer.Option(help="Sample of the data set; repeat for several.")] = None,
    encoder: Annotated[
        str, typer.Option(help="timm or hf-hub: name, checkpoint, stain-texture; + joins.")
    ] = "stain-texture",
    patch_um: Annotated[float | None, typer.Option(help="Side of a patch in µm.  [default: the encoder's]")] = None,
    views: Annotated[int, typer.Option(help="1, or 8 for all flips and quarter turns.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Patches in one forward pass.")] = 64,
    image: Annotated[Path | None, typer.Option(help="Image, where the slide does not name it.")] = None,
    um_per_px: Annotated[float | None, typer.Option(help="Resolution, where the slide does not say.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files made otherwise.")] = False,
) -> None:
    """Extract histology features, one patch a spot, into one HDF5 file a slide.

    DATA may be a table of slides. Several processes share the slides: accelerate launch -m hinge.cli.app features …

    Example: hinge features her2st --sample C5 --encoder stain-texture --output features
    """
    from hinge.data.readers import list_samples, read_slide
    from hinge.encoders import extract_features, load_encoder
    from hinge.utils.parallel import each_slide, work_alone

    loaded = load_encoder(encoder)
    names = sample or list_samples(path)
    if image is not None and len(names) > 1:
        raise ConfigError("--image is the image of one slide; name it with --sample")
    work_alone()

    def extract(name: str) -> Path:
        slide = read_slide(path, name, image=image, um_per_px=um_per_px, require_counts=False)
        target = output / f"{name}.{encoder.replace('/', '_').replace(':', '_')}.h5"
        return extract_features(
            slide, loaded, target, views=views, batch_size=batch_size, patch_um=patch_um, overwrite=overwrite
        )

    for _, written in each_slide(names, extract, output):
        print(f"features: {written}")


@download.command("hest")
def download_hest(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the samples.", show_default=False)],
    id: Annotated[list[str] | None, typer.Option("--id", help="Sample; repeat for several.")] = None,
    organ: Annotated[list[str] | None, typer.Option(help="Samples of an organ, e.g. Breast.")] = None,
    oncotree: Annotated[list[str] | None, typer.Option(help="Samples with an OncoTree code, e.g. IDC.")] = None,
    technology: Annotated[list[str] | None, typer.Option(help="Only these, e.g. Visium.")] = None,
    species: Annotated[list[str] | None, typer.Option(help="Only these, e.g. 'Homo sapiens'.")] = None,
    table: Annotated[Path | None, typer.Option(help="HEST-1k's CSV table.  [default: the hub's]")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Show the samples, download none.")] = False,
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


@download.command("run")
def download_run(
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the run.", show_default=False)],
    backbone: Annotated[
        Path | None, typer.Option(help="The expression model, where the run uses one from elsewhere.")
    ] = None,
    vocabulary: Annotated[Path | None, typer.Option(help="Table of the genes that it knows.")] = None,
) -> None:
    """Download a run that hinge push uploaded, ready for hinge sample.

    Example: hinge download run somebody/her2st-hinge --output runs/theirs
    """
    from hinge.sharing.upload import fetch_run

    print(f"run: {fetch_run(repository, output, backbone, vocabulary)}")


@app.command()
def push(
    path: Annotated[Path, typer.Argument(help="Folder of a run, an encoder or a backbone.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub.", show_default=False)],
    licence: Annotated[str, typer.Option(help="As the hub names it, e.g. cc-by-4.0.", show_default=False)],
    encoder: Annotated[
        str | None, typer.Option(help="Where the run's encoder is a file: how others load it, hf-hub:owner/name.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the model card.  [default: the repository's name]")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it.  [default: private]")] = False,
    allow_licence: Annotated[
        bool,
        typer.Option("--allow-licence", help="You have permission to share weights whose licence forbids it."),
    ] = False,
) -> None:
    """Upload a trained run, an encoder or a backbone with a model card; no slides, no draws, no paths.

    Names of the slides stand in the configuration that goes along.

    Example: hinge push runs/her2st somebody/her2st-hinge --licence cc-by-4.0
    """
    from hinge.sharing.upload import push as upload

    address = upload(
        path, repository, licence, encoder=encoder, private=not public, title=title, allow_licence=allow_licence
    )
    print(f"repository: {address}")


@app.command()
def panel(
    path: Annotated[Path, typer.Argument(help="Data set.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="panel.json to write.", show_default=False)],
    sample: Annotated[list[str] | None, typer.Option(help="Training sample; repeat for several.")] = None,
    method: Annotated[str, typer.Option(help="hmhvg or hvg.")] = "hmhvg",
    genes: Annotated[int, typer.Option(help="Size of the panel.")] = 200,
    from_list: Annotated[Path | None, typer.Option("--list", help="Text file, one gene symbol a line.")] = None,
) -> None:
    """Choose the genes to predict, from training slides only.

    Example: hinge panel her2st --sample C2 --sample C3 --sample C4 --genes 200 --output panel.json
    """
    from hinge.data.panel import read_panel, select_panel
    from hinge.data.readers import list_samples, read_slide
    from hinge.data.spots import load_spots

    names = sample or list_samples(path)
    slides = [read_slide(path, name, require_image=False) for name in names]
    if from_list is None:
        chosen = select_panel(slides, method, genes)
    else:
        chosen = read_panel(from_list)
        for slide in slides:
            load_spots(slide, chosen, "log2p1")  # tells which genes a slide lacks
    print(f"panel: {chosen.save(output)} ({len(chosen.genes)} genes)")


@app.command("pretrain-expression")
def pretrain_expression(
    paths: Annotated[list[Path], typer.Argument(help="h5ad files or data sets with counts.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the backbone.", show_default=False)],
    sample: Annotated[list[str] | None, typer.Option(help="Only these samples; repeat for several.")] = None,
    panel: Annotated[Path | None, typer.Option(help="Genes of the vocabulary.  [default: all shared ones]")] = None,
    transform: Annotated[str, typer.Option(help="log2p1 or log1p_cp10k.")] = "log1p_cp10k",
    hidden_size: Annotated[int, typer.Option()] = 128,
    num_hidden_layers: Annotated[int, typer.Option()] = 4,
    num_attention_heads: Annotated[int, typer.Option()] = 4,
    num_value_bins: Annotated[int, typer.Option()] = 64,
    steps: Annotated[int, typer.Option()] = 3000,
    batch_size: Annotated[int, typer.Option()] = 64,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Pre-train an expression backbone (CellFM's architecture) on counts, by filling in masked genes.

    Example: hinge pretrain-expression her2st --sample A1 --sample D1 --panel panel.json --output backbone
    """
    from hinge.tasks.pretrain_backbone import pretrain_on_files

    pretrain_on_files(
        paths,
        output,
        samples=sample,
        panel=panel,
        transform=transform,
        architecture={
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_value_bins": num_value_bins,
        },
        settings={
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "precision": precision,
        },
        seed=seed,
    )
    print(f"backbone: {output}")


@app.command("pretrain-histology")
def pretrain_histology(config: ConfigFile, overrides: Overrides = None) -> None:
    """Pre-train a histology encoder on the tissue of slides, by iBOT; `hinge features --encoder FOLDER` takes it.

    Example: hinge pretrain-histology --config configs/pretrain/small.yaml training.steps=2000. On several devices:
    accelerate launch scripts/pretrain_histology.py --config configs/pretrain/vit_b16.yaml
    """
    from hinge.tasks.pretrain_encoder import load_pretraining, pretrain

    print(f"encoder: {pretrain(load_pretraining(config, overrides))}")


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train HINGE: panel, features, backbone (pre-trained if need be) and the conditioning path.

    Example: hinge train --config configs/her2st.yaml training.epochs=10. On several devices:
    accelerate launch scripts/train.py --config configs/her2st.yaml
    """
    print(f"model: {_run(config, overrides).train()}")


@app.command()
def sample(
    run: RunFolder,
    slide: Annotated[
        list[str] | None,
        typer.Option(help="Sample of the run's data set, or a slide from elsewhere.  [default: test slides]"),
    ] = None,
    draws: Annotated[int | None, typer.Option(help="Draws a spot.  [default: the run's]", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of revealing genes.  [default: the run's]", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.  [default: the run's]", min=0)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Spot-draws at a time; no effect on the result.", min=1)
    ] = None,
    um_per_px: Annotated[
        float | None, typer.Option(help="Resolution, where a slide from elsewhere does not say.")
    ] = None,
    observed: Annotated[
        Path | None, typer.Option(help="h5ad with measured genes; the others are drawn given them.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="h5ad to write, for one slide.")] = None,
) -> None:
    """Draw the expression of every spot of a slide, several times.

    A slide from elsewhere may be an H&E image alone: its tissue is found, and spots are laid over it at the distance
    of the training slides. Several processes share the slides: accelerate launch -m hinge.cli.app sample …

    Example: hinge sample runs/her2st --slide C5 --draws 20 --steps 20 --seed 0, or: hinge sample runs/her2st --slide
    biopsy.svs
    """
    from hinge.run.run import Run
    from hinge.utils.parallel import each_slide, work_alone

    opened = Run.open(run)
    names = slide or opened.config.data.test
    if not names:
        raise ConfigError("the run names no test slides; give --slide")
    if output is not None and len(names) > 1:
        raise ConfigError("--output takes the draws of one slide; leave it out for several")
    if observed is not None and len(names) > 1:
        raise ConfigError("--observed takes measurements of one slide; leave it out for several")
    if len(names) > 1:
        work_alone()  # processes share the slides, and the spots of a slide that is alone

    def draw(name: str) -> Path:
        data, path = opened.config.data, Path(name)
        elsewhere = path.is_file() or (path.is_dir() and name not in [*data.train, *data.test, *data.pretrain])
        source = {"slide": opened.slide_at(path, um_per_px)} if elsewhere else {"name": name}
        return opened.sample(
            **source,
            output=output,
            draws=draws,
            steps=steps,
            seed=seed,
            batch_size=batch_size,
            observed=observed,
        )

    for _, written in each_slide(names, draw, opened.folder / "samples"):
        print(f"draws: {written}")


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="Folder of a run; or give --data.", show_default=False)] = None,
    slide: Annotated[list[str] | None, typer.Option(help="Sample; repeat for several.  [default: test slides]")] = None,
    predictions: Annotated[
        list[str] | None,
        typer.Option(
            help="Of another program: NAME[:UNITS]=FILE, or NAME=FILE,FILE,… with one draw a file; h5ad, CSV or TSV of "
            "spots × genes; {slide} stands for the slide's name."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Without a run: the data set.", show_default=False)] = None,
    sample: Annotated[list[str] | None, typer.Option(help="Without a run: its sample; repeat for several.")] = None,
    panel: Annotated[Path | None, typer.Option(help="Without a run: genes to score.", show_default=False)] = None,
    transform: Annotated[str | None, typer.Option(help="Without a run: log2p1 or log1p_cp10k.")] = None,
    gene_sets: Annotated[Path | None, typer.Option(help="Without a run: GMT or JSON file of gene sets.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the scores.")] = None,
) -> None:
    """Score draws, and predictions of other programs, beside baselines and the noise ceiling.

    Example: hinge evaluate runs/her2st --predictions stem=stem.h5ad. Without a run: hinge evaluate --data her2st
    --sample C5 --panel panel.json --transform log2p1 --predictions stem=stem.h5ad --output scores.json
    """
    from hinge.evaluation.predictions import PredictionFiles
    from hinge.run.evaluation import evaluate_files
    from hinge.run.run import Run

    files = [PredictionFiles.parse(text) for text in predictions or []]
    alone = {
        "--data": data,
        "--sample": sample,
        "--panel": panel,
        "--transform": transform,
        "--gene-sets": gene_sets,
    }
    given = [name for name, value in alone.items() if value]
    if run is not None:
        if given:
            raise ConfigError(f"{given[0]} is for scores without a run; leave out {run}, or that option")
        _print_scores(Run.open(run).evaluate(slide, files, output))
        return
    needed = {**alone, "--predictions": files, "--output": output}
    missing = [name for name, value in needed.items() if not value and name != "--gene-sets"]
    if missing:
        raise ConfigError(f"without the folder of a run, {', '.join(missing)} must be given")
    if slide:
        raise ConfigError("--slide is for a run; name samples of --data with --sample")
    _print_scores(evaluate_files(data, sample, panel, transform, files, output, gene_sets))


@app.command()
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
    from hinge.run.run import Run

    opened = Run.open(run)
    if interactive:
        from hinge.viewer import write_viewer

        print(f"viewer: {write_viewer(opened, output)}")
        return
    if output is not None:
        raise ConfigError("--output is for --interactive; the report is written into the run's folder")
    from hinge.report import report_run

    print(f"report: {report_run(opened)}")


@app.command()
def view(
    run: RunFolder,
    slide: Annotated[list[str] | None, typer.Option(help="Only this one; repeat for several.  [default: all]")] = None,
    port: Annotated[int, typer.Option(help="On 127.0.0.1; 0 for any free one.", min=0, max=65535)] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address only.")] = False,
) -> None:
    """Look at draws in the browser: full-resolution H&E, spots coloured by any gene, layers side by side.

    Example: hinge view runs/her2st
    """
    from hinge.run.run import Run
    from hinge.viewer import Viewer, serve

    serve(Viewer(Run.open(run), slide), port, browser=not no_browser)


@app.command()
def export(
    run: RunFolder,
    format: Annotated[
        str, typer.Option(help="geojson (QuPath), spatialdata, cellxgene, zarr or torch-export.", show_default=False)
    ],
    slide: Annotated[list[str] | None, typer.Option(help="Sample; repeat for several.  [default: test slides]")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="What to write, for one slide.")] = None,
    gene: Annotated[list[str] | None, typer.Option(help="geojson: only these genes; repeat for several.")] = None,
    full_image: Annotated[bool, typer.Option("--full-image", help="spatialdata: the image in full.")] = False,
    metadata: Annotated[Path | None, typer.Option(help="cellxgene: YAML file of ontology terms.")] = None,
    gene_ids: Annotated[Path | None, typer.Option(help="cellxgene: table of symbols and Ensembl ids.")] = None,
) -> None:
    """Write draws for other tools. samples/NAME.h5ad is already what scanpy and squidpy read.

    torch-export writes the denoiser instead of draws: one step as a program for torch.export.load.

    Example: hinge export runs/her2st --slide C5 --format geojson --gene ERBB2
    """
    from hinge.run.run import Run
    from hinge.sharing.export import export_denoiser, export_draws

    opened = Run.open(run)
    if format == "torch-export":
        print(f"{format}: {export_denoiser(opened, output)}")
        return
    names = slide or opened.config.data.test
    if not names:
        raise ConfigError("the run names no test slides; give --slide")
    if output is not None and len(names) > 1:
        raise ConfigError("--output takes one slide; leave it out for several")
    for name in names:
        print(f"{format}: {export_draws(opened, name, format, output, gene, full_image, metadata, gene_ids)}")


@app.command("finetune-encoder")
def finetune_encoder(
    data: Annotated[Path, typer.Argument(help="Data set.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything.", show_default=False)],
    encoder: Annotated[str, typer.Option(help="Start: as for hinge features, e.g. spafoundation@FILE.")],
    sample: Annotated[list[str] | None, typer.Option(help="Sample; repeat for several.  [default: all]")] = None,
    tune: Annotated[str, typer.Option(help="all weights, lora, or linear (the head only).")] = "all",
    start: Annotated[str, typer.Option(help="The head: ridge (solved on frozen features) or random.")] = "ridge",
    folds: Annotated[str, typer.Option(help="slide, patient, or a .csv or .tsv of slides and groups.")] = "slide",
    hold_out: Annotated[list[str] | None, typer.Option(help="Only these folds; repeat for several.")] = None,
    panel: Annotated[Path | None, typer.Option(help="Genes.  [default: chosen in each fold]")] = None,
    genes: Annotated[int, typer.Option(help="How many are chosen, without --panel.", min=1)] = 200,
    transform: Annotated[str, typer.Option(help="log1p_cp10k or log2p1.")] = "log1p_cp10k",
    patch_um: Annotated[float | None, typer.Option(help="Side of a patch in µm.  [default: the encoder's]")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    learning_rate: Annotated[float | None, typer.Option(help="[default: 1e-5; lora 2e-4, linear 1e-4]")] = None,
    lora_rank: Annotated[int, typer.Option(min=1)] = 8,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train an encoder and a linear head to predict genes, hold out each slide or patient, predict and score it.

    Example: hinge finetune-encoder her2st --sample C2 --sample C3 --sample C4 --sample C5 --encoder
    spafoundation@spafoundation_1m_vitb16.pth --output tuned; then hinge evaluate runs/her2st --predictions
    tuned=tuned/predictions/{slide}.h5ad
    """
    from hinge.data.panel import read_panel
    from hinge.tasks.finetune import finetune_config
    from hinge.tasks.finetune import finetune_encoder as finetune

    config = finetune_config(
        tune=tune,
        start=start,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        lora_rank=lora_rank,
        precision=precision,
    )
    path = finetune(
        data,
        sample,
        encoder,
        output,
        config,
        folds=folds,
        hold_out=hold_out,
        panel=None if panel is None else read_panel(panel),
        n_genes=genes,
        transform=transform,
        patch_um=patch_um,
        seed=seed,
    )
    _print_rows(path)


@app.command("map")
def map_expression(
    run: Annotated[Path, typer.Argument(help="A run, or a fold of finetune-encoder.", show_default=False)],
    slide: Annotated[list[str], typer.Option(help="Sample, or an image; repeat for several.", show_default=False)],
    pitch_um: Annotated[float, typer.Option(help="Distance between the points of the map.")] = 25.0,
    method: Annotated[str, typer.Option(help="regression (ridge on features) or draws (of the trained run).")] = (
        "regression"
    ),
    gene: Annotated[list[str] | None, typer.Option(help="Channel of the image.  [default: ten of the panel]")] = None,
    draws: Annotated[int | None, typer.Option(help="Draws a point.  [default: the run's]", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of revealing genes.  [default: the run's]", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.  [default: the run's]", min=0)] = None,
    batch_size: Annotated[int, typer.Option(help="Patches in one forward pass.", min=1)] = 64,
    um_per_px: Annotated[float | None, typer.Option(help="Resolution, where an image does not say.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder.  [default: RUN/maps]")] = None,
) -> None:
    """Predict expression on a grid finer than the spots, over all tissue: an h5ad, and an OME-TIFF of some genes.

    Example: hinge map runs/her2st --slide C5 --pitch-um 25 --gene ERBB2 --gene CD74
    """
    from hinge.tasks.dense import map_slide, open_predictor

    predictor = open_predictor(run, method, draws, steps, seed)
    for name in slide:
        written = map_slide(
            predictor, predictor.slide(name, um_per_px), output or run / "maps", pitch_um, gene, batch_size
        )
        for what, path in zip(("map", "image"), written, strict=True):
            print(f"{what}: {path}")


probe = typer.Typer(help="What an encoder's features tell of spots, slides held out.", no_args_is_help=True)
app.add_typer(probe, name="probe")

Encoders = Annotated[
    list[str], typer.Option("--encoder", help="As for hinge features; repeat for several.", show_default=False)
]
LabelTable = Annotated[
    str | None,
    typer.Option("--labels", help="CSV or TSV of spots; {slide} stands for its name.  [default: the slides' obs]"),
]
FeatureFolder = Annotated[
    Path | None, typer.Option(help="Folder of feature files, kept and used again.  [default: OUTPUT/features]")
]
RawFeatures = Annotated[bool, typer.Option("--raw", help="Features as they are, not in units of their slide's.")]


@probe.command("tumour")
def probe_tumour(
    data: Annotated[Path, typer.Argument(help="Data set.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for scores.", show_default=False)],
    encoder: Encoders,
    column: Annotated[str, typer.Option(help="Column of the labels.", show_default=False)],
    sample: Annotated[list[str] | None, typer.Option(help="Sample; repeat for several.  [default: all]")] = None,
    labels: LabelTable = None,
    positive: Annotated[list[str] | None, typer.Option(help="Label of tumour; repeat for several.")] = None,
    above: Annotated[str | None, typer.Option(help="Of numbers: a threshold, or median.")] = None,
    patch_um: Annotated[float | None, typer.Option(help="Side of a patch in µm.  [default: the encoder's]")] = None,
    features: FeatureFolder = None,
    raw: RawFeatures = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Tell tumour from the rest by linear probe, nearest neighbours and prototypes, each slide held out in turn.

    Example: hinge probe tumour her2st --sample C2 --sample C3 --labels 'annotations/{slide}.tsv' --column label
    --positive 'invasive cancer' --encoder stain-texture --output probe
    """
    from hinge.tasks.embeddings import read_slides
    from hinge.tasks.labels import binary_labels, read_labels
    from hinge.tasks.probe import probe_labels

    slides = read_slides(data, sample, require_counts=False)
    found, meaning = binary_labels(read_labels(slides, column, labels), positive, above)
    path = probe_labels(
        slides,
        found,
        encoder,
        output,
        meaning=f"{column} {meaning}",
        features_folder=features,
        patch_um=patch_um,
        standardise=not raw,
        seed=seed,
    )
    _print_rows(path)


@app.command()
def cluster(
    data: Annotated[Path, typer.Argument(help="Data set.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything.", show_default=False)],
    encoder: Encoders,
    sample: Annotated[list[str] | None, typer.Option(help="Sample; repeat for several.  [default: all]")] = None,
    method: Annotated[str, typer.Option(help="kmeans, leiden or gmm.")] = "kmeans",
    clusters: Annotated[int | None, typer.Option(help="How many.  [default: as many as labels]", min=2)] = None,
    resolution: Annotated[float, typer.Option(help="Of Leiden without a number of clusters.")] = 1.0,
    smooth: Annotated[int, typer.Option(help="Averagings over a spot and its neighbours.", min=0)] = 1,
    joint: Annotated[bool, typer.Option("--joint", help="All slides together.")] = False,
    column: Annotated[str | None, typer.Option(help="Column of labels to compare with.")] = None,
    labels: LabelTable = None,
    patch_um: Annotated[float | None, typer.Option(help="Side of a patch in µm.  [default: the encoder's]")] = None,
    features: FeatureFolder = None,
    raw: RawFeatures = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Cluster spots by histology: clusters in h5ad and CSV, maps in a report, ARI and NMI against given labels.

    Example: hinge cluster her2st --sample C5 --encoder stain-texture --labels 'clusters/{slide}.tsv.gz' --column label
    --output clusters
    """
    from hinge.report.clusters import report_clusters
    from hinge.tasks.cluster import cluster_slides
    from hinge.tasks.embeddings import read_slides
    from hinge.tasks.labels import read_labels

    if labels is not None and column is None:
        raise ConfigError("--labels needs --column, the name of the column that holds them")
    slides = read_slides(data, sample, require_counts=False)
    path = cluster_slides(
        slides,
        encoder,
        output,
        method=method,
        n_clusters=clusters,
        resolution=resolution,
        smooth=smooth,
        joint=joint,
        labels=None if column is None else read_labels(slides, column, labels),
        features_folder=features,
        patch_um=patch_um,
        standardise=not raw,
        seed=seed,
    )
    report = report_clusters(output)
    _print_rows(path)
    print(f"report: {report}")


@app.command()
def run(config: ConfigFile, overrides: Overrides = None) -> None:
    """All stages: train, sample the test slides, evaluate, report. Finished ones are skipped.

    Example: hinge run --config configs/her2st.yaml
    """
    from hinge.report import report_run
    from hinge.utils.locks import lock_folder

    opened = _run(config, overrides)
    with lock_folder(opened.folder):
        opened.train()
        for name in opened.config.data.test:
            opened.sample(name)
        opened.evaluate()
        path = report_run(opened)
    _print_scores(opened.paths.scores)
    print(f"report: {path}")


@app.command()
def doctor(
    folder: Annotated[
        Path | None, typer.Argument(help="A run, or where backbones may lie.  [default: here]", show_default=False)
    ] = None,
) -> None:
    """Tell versions, devices, memory, network, which encoders and backbones are at hand, and batch sizes that fit.

    Example: hinge doctor runs/her2st
    """
    from rich.console import Console
    from rich.table import Table

    from hinge.cli.doctor import diagnose

    console = Console()
    for section, facts in diagnose(folder).items():
        table = Table(title=section, title_justify="left", title_style="bold", show_header=False, box=None)
        for name, value in facts:
            table.add_row(name, value)
        console.print(table)
        console.print()


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for slides and results.")] = Path("hinge-demo"),
    seed: Annotated[int, typer.Option(help="Of the tissue and of everything after it.", min=0)] = 0,
) -> None:
    """Simulate tissue, train on it, sample a held-out slide, score and report. No download, minutes on a CPU.

    Example: hinge demo --output hinge-demo
    """
    from hinge.experiments.demo import run_demo

    opened = run_demo(output, seed)
    _print_scores(opened.paths.scores)
    print(f"report: {opened.paths.report}")


@app.command()
def ablate(
    grid: Annotated[Path, typer.Argument(help="YAML file of a grid.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder for its runs and tables.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings for every run, e.g. training.steps=50.", show_default=False)
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at the same time.", min=1)] = 1,
) -> None:
    """Run named variants of a configuration, over held-out slides and seeds, and write their table.

    Example: hinge ablate configs/ablations/weights.yaml runs/weights --jobs 2
    """
    from hinge.experiments.ablation import ablate as run_ablation
    from hinge.experiments.grid import load_grid

    tables = run_ablation(load_grid(grid), output, overrides or [], jobs)
    print(tables.markdown.read_text())
    print(f"table: {tables.csv}")
    if tables.failures:
        first = tables.failures[0]
        raise HingeError(f"{len(tables.failures)} runs are missing; the first is {first.name}: {first.message}")


convert = typer.Typer(help="Published weights into ours, and a trained model into the authors' format.")
app.add_typer(convert, name="convert", no_args_is_help=True)

Checkpoint = Annotated[Path, typer.Argument(help="Published file.", show_default=False)]
OutFolder = Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16, for the backbone's weights.")]
Vocabulary = Annotated[
    Path | None, typer.Option(help="Table of the genes that the weights know, to store their names with them.")
]
Heads = Annotated[int | None, typer.Option(help="Attention heads.  [default: 48 at width 1536]", min=1)]


@convert.command("cellfm")
def convert_cellfm(
    checkpoint: Checkpoint,
    out: OutFolder,
    dtype: Dtype = "fp32",
    vocabulary: Vocabulary = None,
    heads: Heads = None,
) -> None:
    """Rewrite CellFM's weights (MindSpore .ckpt, or a torch state dict) as a folder for backbone.path.

    Example: hinge convert cellfm CellFM_800M_weight.ckpt cellfm-800m --dtype bf16 --vocabulary expand_gene_info.csv
    """
    from hinge.sharing import convert as conversion

    written = conversion.convert_cellfm(checkpoint, out, dtype, vocabulary, heads)
    print(f"backbone: {written}")


@convert.command("hinge")
def convert_hinge(
    checkpoint: Checkpoint,
    out: OutFolder,
    dtype: Dtype = "fp32",
    vocabulary: Vocabulary = None,
    heads: Heads = None,
    gate: Annotated[str | None, typer.Option(help="sigmoid or linear.  [default: judged by the weights]")] = None,
) -> None:
    """Rewrite a checkpoint of the authors' HINGE code as a folder with backbone and model.

    Example: hinge convert hinge best_model.pth runs/authors --vocabulary expand_gene_info.csv
    """
    from hinge.sharing import convert as conversion

    if gate not in (None, "sigmoid", "linear"):
        raise ConfigError(f"--gate must be sigmoid or linear, not {gate!r}")
    written = conversion.convert_hinge(checkpoint, out, dtype, gate, vocabulary, heads)
    print(f"model: {written}")


@convert.command("to-authors")
def convert_to_authors(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of hinge convert hinge.", show_default=False)],
    out: Annotated[Path, typer.Argument(help=".pth file to write.", show_default=False)],
) -> None:
    """Write a trained model, backbone included, as the checkpoint that the authors' HINGE code loads.

    Example: hinge convert to-authors runs/released model.pth
    """
    from hinge.sharing import convert as conversion

    print(f"checkpoint: {conversion.export_hinge_folder(run, out)}")


if __name__ == "__main__":
    main()
