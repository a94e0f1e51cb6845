"""Reader of torch files from untrusted sources: no code in them runs, and their sizes are checked."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_torch(path: str | Path, mapped: bool = False) -> Any:
    """Read a `.pth`, `.pt` or `.bin` file; only tensors and plain values are unpickled.

    Parameters
    ----------
    path
        The file.
    mapped
        Map the tensors from the file instead of reading them; for files of torch 1.6 or later.

    Raises
    ------
    Exception
        Any exception of torch for a damaged file; ValueError for a file that would unpack to more than its size. The
        caller adds the name of the file.
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
    """Return the tensors of a mapping by name.

    Raises
    ------
    ValueError
        A tensor has more elements than the file holds: a view can repeat a number.
    """
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{name} is no plain tensor")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} declares {tensor.numel():,} numbers and holds fewer")
    return tensors
