"""Commands that work on histology features alone."""

from pathlib import Path
from typing import Annotated

import typer

from hinge.cli.console import print_rows
from hinge.cli.options import DataSet, Ray, Seed, Workers, as_cluster, existing
from hinge.models.options import DEFAULT_TRANSFORM
from hinge.utils.errors import ConfigError

Encoders = Annotated[
    list[str],
    typer.Option("--encoder", help="Encoder, as in hinge features; repeat for several.", show_default=False),
]
LabelTable = Annotated[
    str | None,
    typer.Option(
        "--labels", help="CSV or TSV of spots; {slide} is replaced by the slide's name.  [default: the slides' obs]"
    ),
]
FeatureFolder = Annotated[
    Path | None, typer.Option(help="Folder of feature files, which are reused.  [default: OUTPUT/features]")
]
RawFeatures = Annotated[
    bool, typer.Option("--raw", help="Use features as stored; do not standardise them in each slide.")
]


def finetune_encoder(
    data: DataSet,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all results.", show_default=False)],
    encoder: Annotated[
        str,
        typer.Option(help="Encoder to start from, as in hinge features, e.g. spafoundation@FILE.", show_default=False),
    ],
    sample: Annotated[list[str] | None, typer.Option(help="Sample; repeat for several.  [default: all]")] = None,
    tune: Annotated[str, typer.Option(help="all weights, lora, or linear (the head only).")] = "all",
    start: Annotated[
        str, typer.Option(help="Initial head: ridge (regression on frozen features) or random.")
    ] = "ridge",
    folds: Annotated[
        str, typer.Option(help="What is held out: slide, patient, or a .csv or .tsv of slides and groups.")
    ] = "slide",
    hold_out: Annotated[list[str] | None, typer.Option(help="Only these folds; repeat for several.")] = None,
    panel: Annotated[Path | None, typer.Option(help="Genes.  [default: chosen in each fold]")] = None,
    genes: Annotated[int, typer.Option(help="Number of genes to choose, without --panel.", min=1)] = 200,
    transform: Annotated[str, typer.Option(help="log2p1 or log1p_cp10k.")] = DEFAULT_TRANSFORM,
    patch_um: Annotated[float | None, typer.Option(help="Side of a patch in µm.  [default: the encoder's]")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training spots.", min=1)] = 20,
    batch_size: Annotated[int, typer.Option(help="Spots of a step, over all processes.", min=1)] = 64,
    learning_rate: Annotated[
        float | None, typer.Option(help="Largest learning rate.  [default: 1e-5; lora 2e-4, linear 1e-4]")
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of the LoRA adapters, with --tune lora.", min=1)] = 8,
    precision: Annotated[str, typer.Option(help="no (float32) or bf16.")] = "no",
    seed: Seed = 0,
    ray: Ray = None,
    workers: Workers = None,
) -> None:
    """Train an encoder and a linear head to predict genes, hold out each slide or patient, predict and score it.

    Example: hinge finetune-encoder her2st --sample C2 --sample C3 --sample C4 --sample C5 --encoder
    spafoundation@spafoundation_1m_vitb16.pth --output tuned; then hinge evaluate runs/her2st --predictions
    tuned=tuned/predictions/{slide}.h5ad
    """
    existing(data)
    from hinge.data.panel import read_panel
    from hinge.tasks.finetune import finetune_config
    from hinge.tasks.finetune import finetune_encoder as finetune

    cluster = as_cluster(ray, workers)
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
        cluster=cluster,
    )
    print_rows(path)


def probe_tumour(
    data: DataSet,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for scores.", show_default=False)],
    encoder: Encoders,
    column: Annotated[str, typer.Option(help="Column of the labels.", show_default=False)],
    sample: Annotated[list[str] | None, typer.Option(help="Sample; repeat for several.  [default: all]")] = None,
    labels: LabelTable = None,
    positive: Annotated[list[str] | None, typer.Option(help="Label of tumour; repeat for several.")] = None,
    above: Annotated[
        str | None, typer.Option(help="For numeric labels: the threshold above which a spot is tumour, or median.")
    ] = None,
    patch_um: Annotated[float | None, typer.Option(help="Side of a patch in µm.  [default: the encoder's]")] = None,
    features: FeatureFolder = None,
    raw: RawFeatures = False,
    seed: Seed = 0,
) -> None:
    """Classify tumour spots by linear probe, nearest neighbours and prototypes, each slide held out in turn.

    Example: hinge probe tumour her2st --sample C2 --sample C3 --labels 'annotations/{slide}.tsv' --column label
    --positive 'invasive cancer' --encoder stain-texture --output probe
    """
    existing(data)
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
    print_rows(path)


def cluster(
    data: DataSet,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all results.", show_default=False)],
    encoder: Encoders,
    sample: Annotated[list[str] | None, typer.Option(help="Sample; repeat for several.  [default: all]")] = None,
    method: Annotated[str, typer.Option(help="kmeans, leiden or gmm.")] = "kmeans",
    clusters: Annotated[
        int | None, typer.Option(help="Number of clusters.  [default: as many as labels]", min=2)
    ] = None,
    resolution: Annotated[float, typer.Option(help="Resolution of Leiden, without --clusters.")] = 1.0,
    smooth: Annotated[
        int, typer.Option(help="Number of times that features are averaged over a spot and its neighbours.", min=0)
    ] = 1,
    joint: Annotated[bool, typer.Option("--joint", help="Cluster all slides together.")] = False,
    column: Annotated[str | None, typer.Option(help="Column of labels to compare with.")] = None,
    labels: LabelTable = None,
    patch_um: Annotated[float | None, typer.Option(help="Side of a patch in µm.  [default: the encoder's]")] = None,
    features: FeatureFolder = None,
    raw: RawFeatures = False,
    seed: Seed = 0,
) -> None:
    """Cluster spots by histology: clusters in h5ad and CSV, maps in a report, ARI and NMI against given labels.

    Example: hinge cluster her2st --sample C5 --encoder stain-texture --labels 'clusters/{slide}.tsv.gz' --column label
    --output clusters
    """
    existing(data)
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
    print_rows(path)
    print(f"report: {report}")
