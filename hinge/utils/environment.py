"""The versions and the machine that a result was made with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hinge.utils.files import write_json
from hinge.utils.packages import DISTRIBUTION, VERSION


def write_environment(path: str | Path) -> None:
    """Record the versions, device and thread count a result was made with."""
    packages: dict[str, str | None] = {DISTRIBUTION: VERSION}
    for name in ("torch", "timm", "diffusers", "transformers", "accelerate", "anndata", "scanpy", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    write_json(
        path,
        {
            "python": platform.python_version(),
            "system": platform.platform(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "packages": packages,
        },
    )
