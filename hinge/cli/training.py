"""Commands that train."""

from pathlib import Path
from typing import Annotated

import typer

from hinge.cli.console import print_scores
from hinge.cli.options import Allow, ConfigFile, Images, Overrides, Resolutions, Seed, open_run
from hinge.config import BackboneConfig, PretrainConfig
from hinge.models.options import DEFAULT_TRANSFORM

_BACKBONE, _PRETRAIN = BackboneConfig(), PretrainConfig()


def pretrain_expression(
    data: Annotated[list[Path], typer.Argument(metavar="DATA", help="Data sets with counts.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the backbone.", show_default=False)],
    sample: Annotated[list[str] | None, typer.Option(help="Only these samples; repeat for several.")] = None,
    panel: Annotated[
        Path | None, typer.Option(help="File of the genes of the vocabulary.  [default: see --num-genes]")
    ] = None,
    num_genes: Annotated[
        int | None,
        typer.Option(help="Without --panel: the most expressed genes.  [default: all in half of the samples]"),
    ] = None,
    transform: Annotated[
        str, typer.Option(help="log2p1 or log1p_cp10k; cellfm only, the others take ranks.")
    ] = DEFAULT_TRANSFORM,
    architecture: Annotated[str, typer.Option(help="cellfm, scgpt or tahoe.")] = _BACKBONE.architecture,
    attention: Annotated[
        str | None, typer.Option(help="generative or full, for scgpt and tahoe.  [default: generative]")
    ] = _BACKBONE.attention,
    hidden_size: Annotated[int, typer.Option(help="Width of a token.")] = _BACKBONE.hidden_size,
    num_hidden_layers: Annotated[int, typer.Option(help="Number of layers.")] = _BACKBONE.num_hidden_layers,
    num_attention_heads: Annotated[
        int, typer.Option(help="Number of attention heads.")
    ] = _BACKBONE.num_attention_heads,
    steps: Annotated[int, typer.Option(help="Number of optimiser steps.")] = _PRETRAIN.steps,
    batch_size: Annotated[int, typer.Option(help="Spots of a step, over all processes.")] = _PRETRAIN.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Largest learning rate.")] = _PRETRAIN.learning_rate,
    precision: Annotated[str, typer.Option(help="no (float32) or bf16.")] = _PRETRAIN.precision,
    genes_per_step: Annotated[
        int, typer.Option(help="Genes of a step, at random where there are more.")
    ] = _PRETRAIN.genes_per_step,
    patient_prefix: Annotated[
        int | None,
        typer.Option(help="First characters of a sample's name that are its patient.  [default: each sample]"),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Pre-train an expression backbone on counts, by predicting masked genes.

    Example: hinge pretrain-expression her2st --sample A1 --sample D1 --panel panel.json --output backbone
    """
    from hinge.tasks.pretrain_backbone import pretrain_on_files

    pretrain_on_files(
        data,
        output,
        samples=sample,
        panel=panel,
        transform=transform,
        architecture={
            "architecture": architecture,
            "attention": attention,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
        },
        settings={
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "precision": precision,
            "genes_per_step": genes_per_step,
        },
        seed=seed,
        patient_prefix=patient_prefix,
        num_genes=num_genes,
    )
    print(f"backbone: {output}")


def pretrain_histology(config: ConfigFile, overrides: Overrides = None) -> None:
    """Pre-train a histology encoder on the tissue of slides, by iBOT; hinge features --encoder FOLDER uses it.

    Example: hinge pretrain-histology --config configs/pretrain/small.yaml training.steps=2000. On several devices:
    accelerate launch scripts/pretrain_histology.py --config configs/pretrain/vit_b16.yaml
    """
    from hinge.tasks.pretrain_encoder import load_pretraining, pretrain

    print(f"encoder: {pretrain(load_pretraining(config, overrides))}")


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    image: Images = None,
    um_per_px: Resolutions = None,
    allow: Allow = None,
) -> None:
    """Train HINGE: panel, features, backbone (pre-trained where no weights are given) and conditioning layers.

    Slides are checked first, as by hinge check.

    Example: hinge train --config configs/her2st.yaml training.epochs=10. On several devices:
    accelerate launch scripts/train.py --config configs/her2st.yaml
    """
    print(f"model: {open_run(config, overrides, image, um_per_px).train(allow or ())}")


def run(
    config: ConfigFile,
    overrides: Overrides = None,
    image: Images = None,
    um_per_px: Resolutions = None,
    allow: Allow = None,
) -> None:
    """Run all stages: check, train, sample the test slides, evaluate, report. Finished stages are skipped.

    Example: hinge run --config configs/her2st.yaml
    """
    opened = open_run(config, overrides, image, um_per_px)
    from hinge.report import report_run
    from hinge.utils.locks import lock_folder

    with lock_folder(opened.folder):
        opened.train(allow or (), check=opened.config.data.test)
        for name in opened.config.data.test:
            opened.sample(name, allow=allow or ())
        opened.evaluate()
        path = report_run(opened)
    print_scores(opened.paths.scores)
    print(f"report: {path}")
