"""Checks of a slide: what is wrong with it, or may be, before anything is computed."""

import logging
from collections.abc import Callable, Collection, Iterator

from anndata import AnnData

from hinge.data.checks.expression import EXPRESSION_CHECKS
from hinge.data.checks.findings import CODES, Context, Finding
from hinge.data.checks.image import IMAGE_CHECKS
from hinge.data.checks.placement import PLACEMENT_CHECKS
from hinge.data.checks.resolution import RESOLUTION_CHECKS
from hinge.data.slide import require_slide, slide_name
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.notices import tell_once

CHECKS: tuple[Callable[[AnnData, Context], Iterator[Finding]], ...] = (
    *RESOLUTION_CHECKS,
    *IMAGE_CHECKS,
    *PLACEMENT_CHECKS,
    *EXPRESSION_CHECKS,
)
"""All checks, each a function of a slide and of what it is checked for."""

_logger = logging.getLogger("hinge.data.checks")


def check_slide(slide: AnnData, context: Context | None = None) -> list[Finding]:
    """Return what is wrong with a slide, or may be; errors first.

    Parameters
    ----------
    slide
        Slide as `read_slide` returns it, or an AnnData of your own.
    context
        What the slide is checked for: the resolution of an encoder's patches, the genes of a panel.

    Returns
    -------
    list of Finding
        Empty for a slide without findings. `docs/reference/findings.md` describes each code.
    """
    try:
        require_slide(slide, require_image="image_path" in slide.uns.get("hinge", {}), require_counts=False)
    except DataError as error:
        return [unreadable(error)]
    found = [finding for check in CHECKS for finding in check(slide, context or Context())]
    # two checks find a turned image, by the thumbnail and by the tissue: the first tells it
    turned = [finding for finding in found if finding.code == "image-orientation"]
    found = [finding for finding in found if finding not in turned[1:]]
    return sorted(found, key=lambda finding: finding.level != "error")


def unreadable(error: DataError) -> Finding:
    """Return the finding for files that hold no slide."""
    return Finding("error", "slide-unreadable", str(error).rstrip("."), "")


def stop_on_errors(slide: AnnData, findings: Collection[Finding], allow: Collection[str] = ()) -> None:
    """Log warnings once, and raise an error for findings that are errors and not allowed.

    Raises
    ------
    ConfigError
        `allow` has a code that does not exist.
    DataError
        A finding is an error.
    """
    require_codes(allow)
    errors = [finding for finding in findings if finding.level == "error" and finding.code not in allow]
    tell(slide, [finding for finding in findings if finding not in errors])
    if errors:
        more = f" (and {len(errors) - 1} more: run hinge check)" if len(errors) > 1 else ""
        raise DataError(f"slide {slide_name(slide)}: {errors[0]}{more}; --allow {errors[0].code} goes on regardless")


def require_codes(allow: Collection[str]) -> None:
    """Require that all codes exist."""
    unknown = [code for code in allow if code not in CODES]
    if unknown:
        raise ConfigError(f"--allow takes the code of a finding, not {unknown[0]!r}: one of {', '.join(CODES)}")


def tell(slide: AnnData, findings: Collection[Finding]) -> None:
    """Log findings; each of a slide once in a process."""
    for finding in findings:
        tell_once(_logger, f"{finding.level}: slide {slide_name(slide)}: {finding}", logging.WARNING)
