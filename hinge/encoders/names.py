"""Names of encoders; importing this module does not import torch."""

import contextlib
from pathlib import Path

STAGES = "stages:"
WITHOUT_STAGES = ("stain-texture",)


def split_name(name: str) -> list[str]:
    """Return the names of the encoders that a name joins by `+`; a path that contains `+` is one name."""
    plain = name.removeprefix(STAGES)
    with contextlib.suppress(OSError):
        if Path(plain.partition("@")[2] or plain).exists():
            return [name]
    return name.split("+")


def with_pooling(name: str, pooling: str | None) -> str:
    """Return a name with `stages:` before each encoder that is a network; as it is where pooling is None."""
    if pooling is None:
        return name
    parts = split_name(name)
    return "+".join(part if part in WITHOUT_STAGES else f"{STAGES}{part.removeprefix(STAGES)}" for part in parts)


def features_file(folder: Path, slide: str, encoder: str) -> Path:
    """Return the path of the feature file of a slide and an encoder in a folder."""
    return folder / f"{slide}.{encoder.replace('/', '_').replace(':', '_')}.h5"
