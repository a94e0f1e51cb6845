"""Histology encoders by name: frozen networks that turn a patch into a vector."""

import contextlib
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from hinge.encoders import stain_texture
from hinge.encoders.recipes import PATCH_UM, RECIPES, Recipe, build
from hinge.encoders.weights import load_weights
from hinge.utils.errors import ConfigError, WeightsError
from hinge.utils.files import arrays_digest, read_json

# of networks that a config.json describes
_LARGEST_SIZE, _MOST_BLOCKS = 1 << 16, 1000
RANDOM_SEED = 0


class Preprocess(nn.Module):
    """Patches as read from an image to what a network takes.

    Parameters
    ----------
    patch_px
        Side of the network's input.
    mean, std
        Normalisation of R, G, B in [0, 1].
    interpolation
        How a patch of another size is resized, always with antialiasing.
    """

    def __init__(
        self,
        patch_px: int,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        interpolation: Literal["bilinear", "bicubic"] = "bicubic",
    ) -> None:
        super().__init__()
        self.patch_px, self.mean, self.std = patch_px, tuple(mean), tuple(std)
        self.interpolation = InterpolationMode(interpolation)

    def forward(self, patches: Tensor) -> Tensor:
        """Uint8 (B, H, W, 3) to float32 (B, 3, patch_px, patch_px)."""
        x = patches.permute(0, 3, 1, 2)
        if x.shape[-1] != self.patch_px or x.shape[-2] != self.patch_px:
            x = TF.resize(x, [self.patch_px, self.patch_px], self.interpolation, antialias=True)
        return TF.normalize(x.to(torch.float32) / 255, self.mean, self.std)

    def describe(self) -> str:
        """Everything that decides the result, as text."""
        return f"{self.patch_px} px, mean {self.mean}, std {self.std}, {self.interpolation.value}"


class Joined(nn.Module):
    """Several encoders side by side on the same patches."""

    def __init__(self, encoders: "Sequence[Encoder]") -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Sequential(encoder.transform, encoder.module) for encoder in encoders)

    def forward(self, patches: Tensor) -> Tensor:
        """Uint8 (B, H, W, 3) to (B, d), the members' features one after the other."""
        return torch.cat([member(patches).to(torch.float32) for member in self.members], dim=1)


@dataclass(frozen=True, eq=False)
class Encoder:
    """A frozen histology encoder.

    Attributes
    ----------
    name
        As `load_encoder` takes it.
    dim
        Numbers per patch, d.
    patch_um
        Side of a patch in µm that it is meant for.
    patch_px
        Side of a patch in pixels to read.
    digest
        SHA-256 of the weights and of what is done to a patch before them.
    transform
        Uint8 patches (B, H, W, 3) to what `module` takes.
    module
        The network, in eval mode and without gradients.
    feature_dtype
        Type that its features are stored in.
    """

    name: str
    dim: int
    patch_um: float
    patch_px: int
    digest: str
    transform: nn.Module
    module: nn.Module
    feature_dtype: Literal["float16", "float32"] = "float16"

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(itertools.chain(self.module.parameters(), self.module.buffers())).device

    def encode(self, batch: np.ndarray, dtype: Literal["float32", "bfloat16"] | None = None) -> np.ndarray:
        """Features of a batch of patches.

        Parameters
        ----------
        batch
            RGB, uint8 (B, H, W, 3); resized if it is not `patch_px` wide.
        dtype
            What the network computes in; None: bfloat16 on CUDA, float32 elsewhere.

        Returns
        -------
        numpy.ndarray
            float32 (B, d).

        Raises
        ------
        ConfigError
            If `dtype` is neither of the two.
        """
        if dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"an encoder computes in float32 or bfloat16, not in {dtype!r}")
        kind = self.device.type
        half = dtype == "bfloat16" or (dtype is None and kind == "cuda")
        patches = torch.from_numpy(batch).to(self.device)
        with torch.inference_mode():
            x = self.transform(patches)
            with torch.autocast(kind, torch.bfloat16) if half else contextlib.nullcontext():
                features = self.module(x)
        return features.to("cpu", torch.float32).numpy()


def load_encoder(
    name_or_path: str, device: str | torch.device | None = None, weights: str | Path | None = None
) -> Encoder:
    """Load a histology encoder, frozen and in eval mode.

    Parameters
    ----------
    name_or_path
        One of

        - `stain-texture`: colour and texture statistics, no weights;
        - `hinge-vit-tiny`: a small ViT whose weights lie in the package;
        - a published encoder, `RECIPES`: `uni`, `conch`, `virchow2`, `spafoundation`, ...;
        - a timm model with pretrained weights: `timm:NAME` or `NAME`;
        - `hf-hub:owner/repo`: a timm model on the Hugging Face Hub;
        - `NAME@FILE`: a published encoder or timm model with weights from a local `.safetensors`, `.pth`,
          `.pt` or `.bin`;
        - a folder, or a weight file in it, beside a `config.json` as `hinge pretrain-histology` or
          `timm.models.save_for_hf` writes it;
        - `random:NAME`: a published encoder or timm model with random weights from a fixed seed;

        or several of these joined by `+`, whose features are concatenated.
    device
        Where it computes; None: CUDA if there is one, else the CPU.
    weights
        Weight file of a published encoder or timm model; the same as `NAME@FILE`.

    Returns
    -------
    Encoder
        Ready to use.

    Raises
    ------
    ConfigError
        If there is no encoder of that name, or encoders of different patches are joined.
    WeightsError
        If weights are missing (the message says which file to fetch and where to put it), damaged, or of
        another network.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = str(name_or_path)
    if weights is not None:
        if "@" in name or "+" in name:
            raise ConfigError(f"weights= goes with one plain encoder name, not with {name!r}")
        name = f"{name}@{weights}"
    parts = [name] if _is_path(name.partition("@")[2] or name) else name.split("+")
    encoders = [_load_one(part, device) for part in parts]
    return encoders[0] if len(encoders) == 1 else _join(encoders)


def _is_path(name: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(name).exists()
    return False


def _load_one(name: str, device: torch.device) -> Encoder:
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
    load_weights(module, file, name.partition("@")[0])
    return _frozen(name, module, _preprocess(recipe), recipe.dim, device, recipe.pooling)


def _preprocess(recipe: Recipe) -> Preprocess:
    return Preprocess(recipe.patch_px, recipe.mean, recipe.std, recipe.interpolation)


def _fetch(name: str, recipe: Recipe) -> Path:
    """The weight file from this package, the user's hub cache, or else from the hub."""
    if recipe.packaged is not None:
        return recipe.packaged
    put = f"put it anywhere and name it as {name}@/path/to/{recipe.file}"
    if recipe.repo is None:
        raise WeightsError(
            f"the weights of {name} ({recipe.licence}) are on no hub: fetch {recipe.file} from {recipe.page}, {put}"
        )
    cached = huggingface_hub.try_to_load_from_cache(recipe.repo, recipe.file)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(huggingface_hub.hf_hub_download(recipe.repo, recipe.file))
    except Exception as error:  # hub and network have many ways to say no
        ask = f"ask for access on {recipe.page}, then " if recipe.gated else ""
        raise WeightsError(
            f"the weights of {name} ({recipe.licence}) are not in the hub cache and could not be fetched: "
            f"{ask}run `hf download {recipe.repo} {recipe.file}`, or fetch that file elsewhere, {put}"
        ) from error


def _random(name: str, architecture: str, device: torch.device) -> Encoder:
    if architecture not in RECIPES and not timm.is_model(architecture.split(".")[0]):
        raise ConfigError(f"encoder {name!r}: after random: stands a timm model or one of {', '.join(RECIPES)}")
    # modules draw from the global generator: give it back as it was
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
    except Exception as error:  # hub, network, timm and torch each raise their own
        repo = model.removeprefix("hf-hub:") if on_hub else timm.get_pretrained_cfg(model).hf_hub_id
        raise WeightsError(
            f"the weights of {name} are not here and could not be fetched ({_first_line(error)}): run "
            f"`hf download {repo}` (ask for access on https://huggingface.co/{repo} where it is gated), or "
            "fetch its weight file elsewhere, put it anywhere and name it as NAME@/path/to/file"
        ) from error
    return _finished(name, module, device, _patch_um_on_hub(model) if on_hub else PATCH_UM)


def _patch_um_on_hub(model: str) -> float:
    """As `_patch_um`, of a repository that timm has just fetched."""
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
            f"{file} does not say of which network it is: put timm's config.json beside it, or give the "
            f"network's name as NAME@{file}"
        )
    _check_size(folder / "config.json", file)
    module = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0)
    load_weights(module, file, name)
    # one set of weights may be pooled in several ways, and features of one must not pass for those of another
    pooling = getattr(module, "global_pool", "token")
    notes = "" if pooling == "token" else str(pooling)
    try:
        return _finished(name, module, device, _patch_um(folder), notes)
    except (TypeError, ValueError, LookupError, RuntimeError, AssertionError, AttributeError) as error:
        raise WeightsError(f"{folder / 'config.json'} does not say how images are prepared: {error}") from error


def _check_size(config: Path, weights: Path) -> None:
    """Refuse a config of a far larger network than its weights are, before memory is asked for it."""
    content = read_json(config)
    arguments = content.get("model_args") if isinstance(content, dict) else None
    sizes = (
        {key: size for key, size in arguments.items() if isinstance(size, int)} if isinstance(arguments, dict) else {}
    )
    if max(sizes.values(), default=0) > _LARGEST_SIZE or sizes.get("depth", 0) > _MOST_BLOCKS:
        raise WeightsError(f"{config} announces a network of impossible size")
    try:
        with torch.device("meta"):
            module = timm.create_model(f"local-dir:{config.parent}", pretrained=False, num_classes=0)
    except Exception as error:  # whatever the file makes timm stumble over
        raise WeightsError(f"{config} does not describe a timm model: {_first_line(error)}") from error
    numbers = sum(parameter.numel() for parameter in module.parameters())
    if numbers > weights.stat().st_size:  # of a byte each at least
        raise WeightsError(
            f"{config} is that of {numbers:,} weights, and {weights} has {weights.stat().st_size:,} bytes"
        )


def _patch_um(folder: Path) -> float:
    """Side of the patches that an encoder of this package was pre-trained on; timm's models do not say."""
    side = read_json(folder / "config.json").get("patch_um", PATCH_UM)
    if not isinstance(side, int | float) or not side > 0:
        raise WeightsError(f"{folder / 'config.json'} has a patch_um of {side!r}, which must be a length in µm")
    return float(side)


def _first_line(error: Exception) -> str:
    """Why it failed, in a few words."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0][:200]


def _finished(
    name: str, module: nn.Module, device: torch.device, patch_um: float = PATCH_UM, notes: str = ""
) -> Encoder:
    """An encoder from a timm model, with the preprocessing that timm attaches to it."""
    data = resolve_model_data_config(module)
    px = data["input_size"][-1]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear" if data["interpolation"] == "bilinear" else "bicubic"
    with torch.no_grad():
        shape = module.eval()(torch.zeros(1, 3, px, px)).shape
    if len(shape) != 2:
        raise ConfigError(f"encoder {name!r} gives {tuple(shape[1:])} numbers a patch and not one vector")
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
