"""Simulated slides, for tests, demonstrations and scores against a known truth."""

import warnings
from pathlib import Path
from typing import Any

from hinge.data.simulate.counts import oracle_draws
from hinge.data.simulate.slides import simulate_slides

__all__ = ["oracle_draws", "simulate_slides", "simulate_tissue"]


def simulate_tissue(*args: Any, **options: Any) -> list[Path]:
    """Deprecated: use `simulate_slides`."""
    warnings.warn("simulate_tissue is deprecated; use simulate_slides", DeprecationWarning, stacklevel=2)
    return simulate_slides(*args, **options)
