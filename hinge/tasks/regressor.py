"""An encoder with a linear head that predicts genes: model, prediction, and its files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from anndata import AnnData
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from hinge.data.patches import PatchReader
from hinge.data.slide import slide_name
from hinge.encoders import RECIPES, Encoder, load_encoder
from hinge.encoders.encoder import Preprocess
from hinge.encoders.networks import PooledStages, PooledTokens
from hinge.evaluation.ridge import fit_ridge
from hinge.utils import checksums
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path, read_json, write_json
from hinge.utils.weights import check_weights


class GeneRegressor(nn.Module):
    """LayerNorm and a linear layer on the features of an encoder.

    Parameters
    ----------
    encoder
        Result of `load_encoder`.
    num_genes
        Number of genes G.
    """

    def __init__(self, encoder: Encoder, num_genes: int):
        super().__init__()
        self.transform, self.encoder = encoder.transform, encoder.module
        self.norm = nn.LayerNorm(encoder.dim)
        self.linear = nn.Linear(encoder.dim, num_genes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return values (B, G) of patches, uint8 (B, H, W, 3), or of their features, float (B, d)."""
        features = self.encoder(self.transform(inputs)) if inputs.dtype == torch.uint8 else inputs
        return self.linear(self.norm(features.float()))

    def head(self) -> dict[str, Tensor]:
        """Return the tensors of the head by name."""
        return {name: t for name, t in self.state_dict().items() if name.split(".")[0] in ("norm", "linear")}


@torch.no_grad()
def start_head(model: GeneRegressor, features: np.ndarray, values: np.ndarray, groups: np.ndarray) -> None:
    """Set the head to the ridge regression on the features of the frozen encoder."""
    inputs = model.norm(torch.from_numpy(features).to(model.norm.weight.device)).cpu().numpy()
    fitted = fit_ridge(inputs, values, groups)
    model.linear.weight.copy_(torch.from_numpy(fitted.weight))
    model.linear.bias.copy_(torch.from_numpy(fitted.bias))


@torch.inference_mode()
def predict_slide(
    model: GeneRegressor, slide: AnnData, encoder: Encoder, patch_um: float, batch_size: int = 64
) -> np.ndarray:
    """Return predicted values (n, G), float32, of all spots of a slide in its order."""
    model.eval()
    device = model.linear.weight.device
    values = np.empty((slide.n_obs, model.linear.out_features), np.float32)
    progress = tqdm(total=slide.n_obs, desc=f"predict {slide_name(slide)}", unit="spot", disable=None)
    with progress:
        for indices, patches in PatchReader(slide, patch_um, encoder.patch_px, batch_size):
            values[indices] = model(torch.from_numpy(patches).to(device)).float().cpu().numpy()
            progress.update(len(indices))
    return values


def save_regressor(model: GeneRegressor, encoder: Encoder, folder: Path, about: dict[str, Any]) -> None:
    """Write the head, the encoder unless only the head was tuned, and `model.json`.

    Parameters
    ----------
    model
        The trained model.
    encoder
        The encoder that it started from.
    folder
        Folder of the fold.
    about
        Content of `model.json` without the name of the encoder: `tune`, `patch_um`, `genes`, `transform`, …
    """
    with atomic_path(folder / "head.safetensors") as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in model.head().items()}, temporary)
    name = encoder.name
    if about["tune"] != "linear":
        name = save_tuned_encoder(model.encoder, encoder, folder / "encoder", about["patch_um"])
    write_json(folder / "model.json", {"encoder": name, **about})


def save_tuned_encoder(module: nn.Module, encoder: Encoder, folder: Path, patch_um: float) -> str:
    """Write a tuned encoder in the format of `load_encoder`.

    Parameters
    ----------
    module
        The tuned network.
    encoder
        The encoder that it was tuned from.
    folder
        Folder for `model.safetensors` and, if timm alone can build the network, `config.json` with its licence.
    patch_um
        Side of the training patches in µm.

    Returns
    -------
    str
        Its name for `load_encoder`: the folder, or `RECIPE@FILE`.
    """
    described = _timm_config(module, encoder)
    core = _network(module)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in core.state_dict().items()}
        save_file(tensors, temporary / "model.safetensors")
        if described is not None:
            write_json(temporary / "config.json", {**described, "patch_um": patch_um})
        checksums.accept(temporary, "finetune-encoder")
    stages = "stages:" if encoder.name.startswith("stages:") else ""
    if described is not None:
        return f"{stages}{folder.resolve()}"
    return f"{stages}{_plain_name(encoder)}@{folder.resolve() / 'model.safetensors'}"


def _plain_name(encoder: Encoder) -> str:
    """Return the name of an encoder's network."""
    return encoder.name.partition("@")[0].removeprefix("stages:").removeprefix("random:")


def _network(module: nn.Module) -> nn.Module:
    """Return the timm network inside its pooling."""
    if isinstance(module, PooledTokens):
        return module.vit
    return module.network if isinstance(module, PooledStages) else module


def _timm_config(module: nn.Module, encoder: Encoder) -> dict[str, Any] | None:
    """Return timm's config.json for a network, None if its recipe is more than a timm model."""
    recipe, folder = RECIPES.get(_plain_name(encoder)), Path(encoder.name.removeprefix("stages:"))
    core = _network(module)
    facts = dict(getattr(core, "pretrained_cfg", None) or {})
    architecture, arguments, licence = facts.get("architecture"), {}, facts.get("license")
    if recipe is not None:
        architecture, arguments, licence = recipe.architecture, dict(recipe.arguments), recipe.licence
        if recipe.pooling != "cls" or not timm.is_model(architecture):
            return None
    else:
        config = (folder if folder.is_dir() else folder.parent) / "config.json"
        if folder.exists() and config.is_file():
            content = read_json(config)
            architecture, arguments = content.get("architecture", architecture), dict(content.get("model_args") or {})
            licence = content.get("licence")
        elif recorded := getattr(core, "model_args", None):
            arguments = dict(recorded)
    try:
        json.dumps(arguments)
        with torch.device("meta"):
            rebuilt = timm.create_model(architecture, num_classes=0, **arguments).state_dict()
    except (TypeError, ValueError, RuntimeError):
        rebuilt = {}
    if {name: t.shape for name, t in rebuilt.items()} != {name: t.shape for name, t in core.state_dict().items()}:
        if recipe is not None:
            return None
        raise ConfigError(
            f"encoder {encoder.name} supports --tune linear only: timm cannot build its network from a config.json"
        )
    transform: Preprocess = encoder.transform
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.dim,
        "model_args": arguments,
        **({} if licence is None else {"licence": licence}),
        "pretrained_cfg": {
            "input_size": [3, transform.patch_px, transform.patch_px],
            "mean": list(transform.mean),
            "std": list(transform.std),
            "interpolation": transform.interpolation.value,
            **{key: facts[key] for key in ("fixed_input_size", "first_conv", "classifier") if key in facts},
        },
    }


def load_regressor(
    folder: str | Path, device: str | torch.device | None = None
) -> tuple[GeneRegressor, Encoder, dict[str, Any]]:
    """Return the encoder and head of a finished fold.

    Parameters
    ----------
    folder
        `folds/<name>` of `finetune_encoder`.
    device
        Device of the model; None for CUDA if there is one.

    Returns
    -------
    tuple
        `GeneRegressor` in eval mode, its `Encoder`, and the content of `model.json`.
    """
    folder = Path(folder)
    about = read_json(folder / "model.json")
    name = about["encoder"]
    if about["tune"] != "linear" and (folder / "encoder").is_dir():
        # the folder may have been moved since
        weights = folder / "encoder" / "model.safetensors"
        name = f"{name.partition('@')[0]}@{weights}" if "@" in name else str(folder / "encoder")
    encoder = load_encoder(name, device=device)
    model = GeneRegressor(encoder, len(about["genes"]))
    head = load_file(checksums.verified(folder / "head.safetensors"))
    check_weights(head, folder / "head.safetensors")
    if {key: t.shape for key, t in head.items()} != {key: t.shape for key, t in model.head().items()}:
        raise DataError(f"{folder / 'head.safetensors'} does not fit encoder {name} and {len(about['genes'])} genes")
    model.load_state_dict(head, strict=False)
    return model.to(encoder.device).eval().requires_grad_(False), encoder, about
