"""Slides, images, panels, transforms, features and spots: everything that knows no model."""

from hinge.data.image import SlideImage
from hinge.data.panel import Panel, select_panel
from hinge.data.readers import list_samples, read_slide, recognise_format
from hinge.data.simulate import oracle_draws, simulate_tissue
from hinge.data.slide import slide_name, validate_slide
from hinge.data.spots import SpotTable, concatenate_spots, load_spots
from hinge.data.transforms import Transform, get_transform

__all__ = [
    "Panel",
    "SlideImage",
    "SpotTable",
    "Transform",
    "concatenate_spots",
    "get_transform",
    "list_samples",
    "load_spots",
    "oracle_draws",
    "read_slide",
    "recognise_format",
    "select_panel",
    "simulate_tissue",
    "slide_name",
    "validate_slide",
]
