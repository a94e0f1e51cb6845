"""Commands that exchange models with others: the Hugging Face Hub and published checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from hinge.utils.errors import ConfigError

Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Published file.", show_default=False)]
PublishedFolder = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help="Published folder, or the file of the weights in it.", show_default=False
    ),
]
OutFolder = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.", show_default=False)]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16, for the backbone's weights.")]
Attention = Annotated[str | None, typer.Option(help="generative or full.  [default: as published]")]
Vocabulary = Annotated[
    Path | None, typer.Option(help="Table of the genes in the weights' vocabulary; their symbols are stored too.")
]
Heads = Annotated[int | None, typer.Option(help="Attention heads.  [default: 48 at width 1536]", min=1)]


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of a run, an encoder or a backbone.", show_default=False)
    ],
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="owner/name on the Hugging Face Hub.", show_default=False)
    ],
    licence: Annotated[str, typer.Option(help="Licence as the hub names it, e.g. cc-by-4.0.", show_default=False)],
    encoder: Annotated[
        str | None,
        typer.Option(help="Name by which others load the encoder of the run, where it is a file: hf-hub:owner/name."),
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Title of the model card.  [default: the repository's name]")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.  [default: private]")] = False,
    allow_licence: Annotated[
        bool,
        typer.Option("--allow-licence", help="You have permission to share weights whose licence forbids it."),
    ] = False,
) -> None:
    """Upload a trained run, an encoder or a backbone with a model card; no slides, no draws, no paths.

    The configuration, which is uploaded too, contains the names of the slides.

    Example: hinge push runs/her2st somebody/her2st-hinge --licence cc-by-4.0
    """
    from hinge.sharing.upload import push as upload

    address = upload(
        folder, repository, licence, encoder=encoder, private=not public, title=title, allow_licence=allow_licence
    )
    print(f"repository: {address}")


def download_run(
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="owner/name on the Hugging Face Hub.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the run.", show_default=False)],
    backbone: Annotated[Path | None, typer.Option(help="Backbone, where it is not part of the repository.")] = None,
    vocabulary: Annotated[Path | None, typer.Option(help="Table of the genes in the backbone's vocabulary.")] = None,
) -> None:
    """Download a run that hinge push uploaded, ready for hinge sample.

    Example: hinge download run somebody/her2st-hinge --output runs/theirs
    """
    from hinge.sharing.upload import fetch_run

    print(f"run: {fetch_run(repository, output, backbone, vocabulary)}")


def convert_cellfm(
    checkpoint: Checkpoint,
    output: OutFolder,
    dtype: Dtype = "fp32",
    vocabulary: Vocabulary = None,
    heads: Heads = None,
) -> None:
    """Rewrite CellFM's weights (MindSpore .ckpt, or a torch state dict) as a folder for backbone.path.

    Example: hinge convert cellfm CellFM_800M_weight.ckpt cellfm-800m --dtype bf16 --vocabulary expand_gene_info.csv
    """
    from hinge.sharing import convert as conversion

    written = conversion.convert_cellfm(checkpoint, output, dtype, vocabulary, heads)
    print(f"backbone: {written}")


def convert_scgpt(
    checkpoint: PublishedFolder, out: OutFolder, dtype: Dtype = "fp32", attention: Attention = None
) -> None:
    """Rewrite scGPT's or scGPT-spatial's weights (best_model.pt, args.json, vocab.json) as a folder for backbone.path.

    Example: hinge convert scgpt scGPT_human scgpt-human --dtype bf16
    """
    from hinge.sharing import convert as conversion

    print(f"backbone: {conversion.convert_transformer('scgpt', checkpoint, out, dtype, attention)}")


def convert_tahoe(
    checkpoint: PublishedFolder, out: OutFolder, dtype: Dtype = "fp32", attention: Attention = None
) -> None:
    """Rewrite Tahoe-x1's weights (model.safetensors, model_config.yml, vocab.json) as a folder for backbone.path.

    Example: hinge convert tahoe Tahoe-x1/70m-model tahoe-70m --dtype bf16
    """
    from hinge.sharing import convert as conversion

    print(f"backbone: {conversion.convert_transformer('tahoe', checkpoint, out, dtype, attention)}")


def convert_hinge(
    checkpoint: Checkpoint,
    output: OutFolder,
    dtype: Dtype = "fp32",
    vocabulary: Vocabulary = None,
    heads: Heads = None,
    gate: Annotated[
        str | None, typer.Option(help="Gate of SoftAdaLN: sigmoid or linear.  [default: inferred from the weights]")
    ] = None,
) -> None:
    """Rewrite a checkpoint of the authors' HINGE code as a folder with backbone and model.

    Example: hinge convert hinge best_model.pth runs/authors --vocabulary expand_gene_info.csv
    """
    from hinge.sharing import convert as conversion

    if gate not in (None, "sigmoid", "linear"):
        raise ConfigError(f"--gate must be sigmoid or linear, not {gate!r}")
    written = conversion.convert_hinge(checkpoint, output, dtype, gate, vocabulary, heads)
    print(f"model: {written}")


def convert_to_authors(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or of hinge convert hinge.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help=".pth file to write.", show_default=False)],
) -> None:
    """Write a trained model, backbone included, as the checkpoint that the authors' HINGE code loads.

    Example: hinge convert to-authors runs/released model.pth
    """
    from hinge.sharing import convert as conversion

    print(f"checkpoint: {conversion.export_hinge_folder(run, output)}")
