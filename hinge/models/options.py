"""Names of the options of a `HingeModel`; importing this module does not import torch."""

from collections.abc import Mapping
from typing import Any, Final

HEADS = (
    "point",
    "gaussian",
    "censored_gaussian",
    "rounded_gaussian",
    "rounded_mixture",
    "negative_binomial",
    "zero_inflated_negative_binomial",
)
DEFAULT_HEAD: Final = "rounded_gaussian"
DEFAULT_TRANSFORM: Final = "log2p1"
"""Transform of counts in a model, in a run, and in commands without a run."""

COUNT_HEADS = ("rounded_gaussian", "rounded_mixture", "negative_binomial", "zero_inflated_negative_binomial")
ALLOWED: dict[str, tuple[str | None, ...]] = {
    "head": HEADS,
    "injection": ("soft_adaln", "adaln_zero", "concatenation", "cross_attention"),
    "gate": ("sigmoid", "linear"),
    "norm": ("soft", "layer", "none"),
    "start": ("identity", "random"),
    "tuning": ("frozen", "full", "lora"),
    "condition_on_visible": ("current", "next", None),
}


def needs_library_size(head: str, transform: str | None) -> bool:
    """Return whether the values that counts can take depend on the spot's library size."""
    return head in COUNT_HEADS and transform == "log1p_cp10k"


def check_options(given: Mapping[str, Any]) -> None:
    """Check the options of a `HingeModel`.

    Raises
    ------
    ValueError
        An option has none of its values, or two do not go together.
    """
    for name, allowed in ALLOWED.items():
        if given[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {given[name]!r}")
    head, transform = given["head"], given["transform"]
    if head in COUNT_HEADS and transform is None:
        raise ValueError(f"the head {head} is one of counts and needs the transform of the values")
    if needs_library_size(head, transform) and not given["library_size"]:
        raise ValueError(f"the head {head} needs the library size under log1p_cp10k")
