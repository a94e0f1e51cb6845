"""Names of an AnnData's layers, which since anndata 0.13 also list X, under the key None."""

from typing import Any

from anndata import AnnData


def named_layers(content: AnnData) -> dict[str, Any]:
    """Return the layers by name, without X."""
    return {name: layer for name, layer in content.layers.items() if name is not None}


def draw_names(content: AnnData) -> list[str]:
    """Return the names of the layers that hold draws, `draw_000`, `draw_001`, ..., in order."""
    return sorted(name for name in content.layers if name is not None and name.startswith("draw_"))
