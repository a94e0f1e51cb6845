"""The checks of a slide that depend on a run: what its draws need, and how far it is from the training slides."""

from collections.abc import Collection

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from hinge.data.checks import Finding
from hinge.data.checks.novelty import check_novelty
from hinge.diffusion.masked_slide import spot_novelty
from hinge.run.preparation import Preparation
from hinge.run.sampling import load_pipeline
from hinge.utils.errors import DataError


def check_against_training(
    inputs: Preparation, slide: AnnData, allow: Collection[str] = ()
) -> tuple[list[Finding], NDArray[np.float64] | None]:
    """Return the findings of a slide and the novelty of its spots (n,); see `Run.check`."""
    findings = inputs.findings_to_sample(slide)
    if any(finding.level == "error" and finding.code not in allow for finding in findings):
        return findings, None
    model = load_pipeline(inputs).model
    if model.slide_prior is None:
        raise DataError(f"the model in {inputs.paths.folder} does not know its training features: train it again")
    novelty = spot_novelty(model, inputs.conditions(slide, inputs.features(slide))[:, 0])
    return [*findings, *check_novelty(novelty)], novelty
