"""Slides, images, panels, transforms, features and spots: everything that knows no model."""

import importlib
from typing import Any

from hinge.data.image import SlideImage
from hinge.data.panel import Panel, select_panel
from hinge.data.readers import list_samples, read_slide, recognise_format
from hinge.data.simulate.tissue import oracle_draws, simulate_tissue
from hinge.data.slide import slide_name, validate_slide
from hinge.data.spots import SpotTable, concatenate_spots, load_spots
from hinge.data.transforms import Transform, get_transform

# loaded when first asked for: reading slides and counts needs no feature files
_ON_DEMAND = {name: "hinge.data.features" for name in ("FeatureWriter", "Features", "read_features")}

__all__ = [
    "FeatureWriter",
    "Features",
    "Panel",
    "SlideImage",
    "SpotTable",
    "Transform",
    "concatenate_spots",
    "get_transform",
    "list_samples",
    "load_spots",
    "oracle_draws",
    "read_features",
    "read_slide",
    "recognise_format",
    "select_panel",
    "simulate_tissue",
    "slide_name",
    "validate_slide",
]


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(importlib.import_module(_ON_DEMAND[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
