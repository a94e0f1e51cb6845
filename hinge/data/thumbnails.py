"""Small images beside a slide, as Space Ranger writes them."""

import gzip
import io
from pathlib import Path

import numpy as np
from PIL import Image

from hinge.utils.errors import DataError, one_line

_MOST_BYTES = 200 << 20


def read_thumbnail(path: str | Path) -> np.ndarray:
    """Return an image as RGB, uint8 (h, w, 3); the file may be compressed by gzip.

    Raises
    ------
    DataError
        It is damaged.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(_MOST_BYTES)
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is damaged or not an image that can be read: {one_line(error)}") from error
