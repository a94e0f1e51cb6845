"""Torch files of strangers: read without running anything in them, and without believing what they announce."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_torch(path: str | Path, mapped: bool = False) -> Any:
    """What a `.pth`, `.pt` or `.bin` holds, of which nothing but tensors and plain values is unpickled.

    Parameters
    ----------
    path
        The file.
    mapped
        Leave the tensors in the file; for files that torch has written since 1.6.

    Raises
    ------
    Exception
        Whatever torch raises for a file that is not one, in a dozen kinds; ValueError for one that would unpack to
        more than it is. The caller knows which file it asked for and says so.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("parts of it are compressed, which torch never does")
        if sum(member.file_size for member in members) > Path(path).stat().st_size:
            raise ValueError("its parts overlap")
    return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)


def plain_tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a mapping by name.

    Raises
    ------
    ValueError
        One has more elements than the file holds: a view can repeat one number any number of times.
    """
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{name} is no plain tensor")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} announces {tensor.numel():,} numbers and holds fewer")
    return tensors
