"""Licences of weights, and the check before an upload."""

import re
from collections.abc import Mapping
from typing import Any

from hinge.utils.errors import ConfigError

BACKBONE_LICENCES = {"cellfm": "cc-by-nc-nd-4.0", "scgpt": "mit", "tahoe": "apache-2.0"}
"""Licences of the published weights of each model, as their model cards state them."""

_CELLFM_WIDTH = 1536  # of both published sizes


def forbids_sharing(licence: str | None) -> bool:
    """Return whether a licence, e.g. "CC BY-NC-ND 4.0", forbids sharing adapted or converted weights."""
    return licence is not None and "nd" in re.split(r"[\s-]+", licence.lower())


def recorded_licence(config: Mapping[str, Any]) -> str | None:
    """Return the licence in the config of a backbone, None if it was pre-trained with this package.

    CellFM that was converted before the licence was recorded is recognised by the width of the published models.
    """
    old = config.get("model_type") == "cellfm" and config.get("hidden_size") == _CELLFM_WIDTH
    return config.get("licence") or (BACKBONE_LICENCES["cellfm"] if old else None)


def check_licence(what: str, licence: str | None, allowed: bool) -> None:
    """Raise an error if a licence forbids the upload of weights, unless the user states to have permission.

    Raises
    ------
    ConfigError
        The licence forbids it.
    """
    if forbids_sharing(licence) and not allowed:
        raise ConfigError(
            f"{what} may not be uploaded: it is made from weights under {licence}, which forbids sharing adapted or "
            "converted weights; give --allow-licence (allow_licence=True in Python) if their authors gave permission"
        )
