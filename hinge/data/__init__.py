"""Slides, images, patches, panels, transforms, spots and feature files. This package knows no model."""

import importlib
from typing import Any

from hinge.data.panel import Panel, select_panel
from hinge.data.readers import list_samples, read_slide, recognise_format
from hinge.data.simulate import oracle_draws, simulate_slides, simulate_tissue
from hinge.data.slide import check_slide, slide_name, validate_slide
from hinge.data.slide_image import SlideImage
from hinge.data.spots import SpotTable, concatenate_spots, load_spots
from hinge.data.transforms import Transform, get_transform

# imported on first use: reading slides and counts needs no feature files
_ON_DEMAND = {
    "FeatureWriter": "hinge.data.feature_writer",
    "Features": "hinge.data.features",
    "read_features": "hinge.data.features",
}

__all__ = [
    "FeatureWriter",
    "Features",
    "Panel",
    "SlideImage",
    "SpotTable",
    "Transform",
    "check_slide",
    "concatenate_spots",
    "get_transform",
    "list_samples",
    "load_spots",
    "oracle_draws",
    "read_features",
    "read_slide",
    "recognise_format",
    "select_panel",
    "simulate_slides",
    "simulate_tissue",
    "slide_name",
    "validate_slide",
]


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(importlib.import_module(_ON_DEMAND[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
