"""What is known of a slide as a whole: read, checked and described for the provenance of draws."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from hinge.data.bulk import Bulk, bulk_digest, read_bulk
from hinge.data.condition_tokens import UNKNOWN, ConditionTokens
from hinge.data.library_sizes import library_sizes
from hinge.data.slide import slide_name
from hinge.data.slide_levels import library_ratios
from hinge.diffusion.slide_effect import BULK_SD, LibrarySpread, SlideEvidence
from hinge.models.hinge import HingeModel
from hinge.utils.errors import ConfigError

logger = logging.getLogger(__name__)

LIBRARY_SIZES = ("slide", "training", "unknown")


def slide_evidence(
    model: HingeModel,
    slide: AnnData,
    genes: list[str],
    patient: str | None = None,
    bulk: Bulk | None = None,
    bulk_sd: float | None = None,
    library_size: float | str | None = None,
    shares: Mapping[str, float] | None = None,
    tokens: ConditionTokens | None = None,
    categories: Mapping[str, str | None] | None = None,
) -> tuple[SlideEvidence, dict[str, Any]]:
    """Return what is known of a slide, and the same for the provenance of its draws.

    Parameters
    ----------
    model
        With a `SlidePrior`; without one nothing but None can be given.
    slide
        Whose counts, if it has any, give the library size `"slide"`.
    genes
        The panel.
    patient
        Name of the slide's patient; None: a new one.
    bulk, bulk_sd
        A bulk profile, see `hinge.data.bulk.read_bulk`, and the standard deviation of its platform effect, log2.
    library_size
        Mean over spots of the counts over all genes; `"slide"`: that of the slide's own counts; `"training"`: that of
        the training slides; `"unknown"`: drawn from those of all patients. None: of a patient that is known, his
        slides'; else the slide's own where it has counts, or the training slides'.
    shares
        With which the library size of the slide's own counts is computed, see `hinge.data.library_sizes`.
    tokens, categories
        The model's condition tokens, and the slide's category of each.

    Raises
    ------
    ConfigError
        The model cannot take it, or a value is out of range.
    """
    prior = model.slide_prior
    if prior is None:
        for option, value in (("--bulk", bulk), ("--library-size", library_size)):
            if value is not None:
                raise ConfigError(
                    f"{option} needs a model with a prior of slide levels; train the run again to have one"
                )
        return SlideEvidence(), {}
    if isinstance(library_size, str) and library_size not in LIBRARY_SIZES:
        raise ConfigError(f"--library-size takes a number or one of {', '.join(LIBRARY_SIZES)}, not {library_size!r}")
    if isinstance(library_size, int | float) and not 1 <= library_size < 1e9:
        raise ConfigError(f"--library-size takes a mean count of a spot from 1 on, not {library_size:g}")
    if bulk_sd is not None and not 0 <= bulk_sd < 10:
        raise ConfigError(f"--bulk-sd takes a number from 0 to 10, not {bulk_sd:g}")
    known = patient in prior.patients
    sizes = _library_sizes(slide, shares or {})
    measured = None if sizes is None else float(sizes.mean())
    if library_size == "slide" and measured is None:
        raise ConfigError(f"slide {slide_name(slide)} has no counts; give --library-size a number instead of slide")
    resolved: float | str | None = library_size
    if library_size == "slide" or (library_size is None and not known and measured is not None):
        resolved = measured
    elif library_size is None and not known:
        resolved = "training"
    sd = 0.0 if bulk is None else float(BULK_SD if bulk_sd is None else bulk_sd)
    about: dict[str, Any] = {
        "patient": patient if known and patient is not None else "new",
        "library_size": "patient" if resolved is None else resolved,
        "bulk": "" if bulk is None else bulk_digest(bulk),
        "bulk_sd": sd,
    }
    composition = None if bulk is None else read_bulk(bulk, genes)
    spread = None
    if sizes is not None and len(sizes) > 1 and resolved == measured:
        spread = LibrarySpread(library_ratios(sizes), float(np.log(sizes).std()))
    if tokens is None or not len(tokens):
        return SlideEvidence(patient if known else None, composition, sd, resolved, spread), about
    given = {name: (categories or {}).get(name) for name in tokens.shares}
    for name, category in given.items():
        if category is not None and category not in tokens.shares[name]:
            logger.warning("slide %s: no training slide has %s %s; it is unknown", slide_name(slide), name, category)
            given[name] = None
    about["condition"] = ", ".join(f"{name}={category or UNKNOWN}" for name, category in given.items())
    of_slide = tokens.known(given)
    return SlideEvidence(patient if known else None, composition, sd, resolved, spread, of_slide), about


def log_evidence(model: HingeModel, slide: AnnData, about: dict[str, Any]) -> None:
    """Say for which patient and at which library size a slide is drawn; `about` is from `slide_evidence`."""
    if model.slide_prior is None:
        return
    size = about["library_size"]
    named = {
        "patient": "that of the patient's other slides",
        "training": f"that of the training slides, {2 ** float(model.slide_prior.training_library[0]):,.0f}",
        "unknown": "unknown",
    }
    logger.info(
        "slide %s: patient %s, mean library size %s%s",
        slide_name(slide),
        about["patient"],
        named[size] if isinstance(size, str) else f"{size:,.0f}",
        ", bulk profile" if about["bulk"] else "",
    )
    if model.config.transform == "log2p1" and about["patient"] == "new" and size in ("training", "unknown"):
        logger.warning(
            "slide %s is drawn in log2(count + 1) without its library size, with which all values rise; "
            "--library-size gives it",
            slide_name(slide),
        )


def _library_sizes(slide: AnnData, shares: Mapping[str, float]) -> NDArray[np.float64] | None:
    """Return the library sizes of the spots of a slide that have counts; None without counts."""
    if slide.n_vars == 0 or slide.X is None:
        return None
    sizes = library_sizes(slide, shares) if shares else np.asarray(slide.X.sum(axis=1), dtype=np.float64).ravel()
    return sizes[sizes > 0] if (sizes > 0).any() else None
