"""Checks of the resolution: its sources against each other, and its value."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anndata import AnnData

from hinge.data.checks.findings import Context, Finding, Level
from hinge.data.resolution import SOURCES
from hinge.data.slide_image import PLAUSIBLE_UM_PER_PX

_WARN_ABOVE, _ERROR_ABOVE = 0.05, 0.25
_COARSEST_UM_PER_PX = 4.0
_COARSER_THAN_TARGET = 2.0
_THUMBNAILS = ("hires_image", "lowres_image", "tissue_hires", "tissue_lowres", "thumbnail", "downscaled")


def contradictions(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find sources of the resolution that differ from the one in use."""
    source = slide.uns["hinge"].get("source", {})
    known: dict[str, float] = source.get("resolutions", {})
    origin = str(source.get("um_per_px_from", ""))
    used = known.get(origin, math.nan)
    others = {name: abs(math.log(value / used)) for name, value in known.items() if name != origin and used > 0}
    if not others:
        return
    worst = max(others, key=lambda name: others[name])
    if others[worst] <= math.log1p(_WARN_ABOVE):
        return
    # a value that was given and that the spots confirm is right, whatever a file says
    confirmed = origin == "option" and others.get("array", math.inf) <= math.log1p(_WARN_ABOVE)
    level: Level = "error" if others[worst] > math.log1p(_ERROR_ABOVE) and not confirmed else "warning"
    differ = [name for name in others if others[name] > math.log1p(_WARN_ABOVE)]
    values = " and ".join(f"{known[name]:.4g} by {SOURCES[name]}" for name in differ)
    yield Finding(
        level,
        "resolution-contradiction",
        f"µm per pixel are {used:.4g} by {SOURCES[origin]} but {values}",
        "give the right value with --um-per-px, and the image that the positions belong to with --image",
    )


def implausible(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find a resolution that no microscope gives."""
    um_per_px = _um_per_px(slide)
    low, high = PLAUSIBLE_UM_PER_PX
    if math.isfinite(um_per_px) and not low <= um_per_px <= high:
        yield Finding(
            "error",
            "resolution-implausible",
            f"{um_per_px:.4g} µm per pixel are outside {low:g} to {high:g}",
            "give the µm per full-resolution pixel of the image with --um-per-px (0.5 at 20×, 0.25 at 40×)",
        )


def coarse(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find an image that is coarser than the encoder's patches."""
    um_per_px = _um_per_px(slide)
    if not slide.uns["hinge"].get("image_path") or not um_per_px > _COARSER_THAN_TARGET * context.target_um_per_px:
        return
    if um_per_px > PLAUSIBLE_UM_PER_PX[1]:
        return
    yield Finding(
        "error" if um_per_px > _COARSEST_UM_PER_PX else "warning",
        "image-coarse",
        f"the image has {um_per_px:.3g} µm per pixel, {um_per_px / context.target_um_per_px:.1f} times as coarse as "
        f"the {context.target_um_per_px:g} of the encoder's patches",
        "give the full-resolution image with --image",
    )


def thumbnail(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find a thumbnail in place of the full-resolution image."""
    path = slide.uns["hinge"].get("image_path")
    if path and any(sign in Path(path).name.lower() for sign in _THUMBNAILS):
        yield Finding(
            "warning",
            "image-thumbnail",
            f"{Path(path).name} is a thumbnail by its name, at {_um_per_px(slide):.3g} µm per pixel",
            "give the full-resolution image with --image",
        )


def _um_per_px(slide: AnnData) -> float:
    facts: dict[str, Any] = slide.uns["hinge"]
    return float(facts.get("um_per_px", math.nan))


RESOLUTION_CHECKS: tuple[Callable[[AnnData, Context], Iterator[Finding]], ...] = (
    contradictions,
    implausible,
    coarse,
    thumbnail,
)
