"""Frozen histology encoders and the extraction of their features."""

from hinge.utils.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "encoder": ("Encoder",),
        "extract": ("extract_features",),
        "recipes": ("RECIPES", "Recipe"),
        "registry": ("load_encoder",),
    },
)
