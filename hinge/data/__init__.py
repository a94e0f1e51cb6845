"""Slides, images, patches, panels, transforms, spots and feature files. This package imports no models."""

from hinge.utils.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "panel": ("Panel", "select_panel"),
        "readers": ("list_samples", "read_slide", "recognise_format"),
        "simulate": ("oracle_draws", "simulate_slides", "simulate_tissue"),
        "checks": ("check_slide",),
        "slide": ("slide_name", "validate_slide"),
        "slide_image": ("SlideImage",),
        "spots": ("SpotTable", "concatenate_spots", "load_spots"),
        "transforms": ("Transform", "get_transform"),
        "feature_writer": ("FeatureWriter",),
        "features": ("Features", "read_features"),
    },
)
