"""Adaptation of a trained run to one slide, some of whose spots were measured: its level, and its regression."""

import logging
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hinge.config import save_config
from hinge.data.observed import read_observed
from hinge.diffusion.evidence import slide_evidence
from hinge.diffusion.inputs import SlideInputs
from hinge.diffusion.masked_slide import regression_condition
from hinge.diffusion.pipeline import HingePipeline
from hinge.diffusion.slide_effect import LevelEffect
from hinge.models.hinge import HingeModel
from hinge.models.slide_effects import SlidePrior
from hinge.run.run import Run
from hinge.utils import checksums
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path, read_json, remove_left_behind, write_json

logger = logging.getLogger(__name__)

SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""How much the weights of another patient may differ, in units of their posterior deviation in training."""

FEWEST_SPOTS = 5


def adapt_run(
    run: Run, name: str, observed: Path, output: Path, patient: str | None = None, library_size: float | None = None
) -> Path:
    """Write a run that is adapted to a slide by measured spots; it takes seconds.

    Two things change. The prior of slide levels has the slide's patient as one more patient, with the level that is
    expected given the measured spots. And the weights of the regression are the posterior of a Gaussian regression: the
    prior has the mean of the trained weights and their posterior covariance, times a scale that the likelihood of the
    measured spots chooses (empirical Bayes; Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006,
    section 5.4). At the scale 0 nothing changes.

    Parameters
    ----------
    run
        Trained.
    name
        A slide of the run's data set.
    observed
        h5ad with the measured counts of some spots, see `hinge.data.observed.read_observed`.
    output
        Folder of the new run, which must not exist.
    patient
        Name of the slide's patient in the new run; None: the slide's.
    library_size
        Mean over spots of the counts over all genes, if it is known.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    DataError
        Fewer than `FEWEST_SPOTS` spots were measured, or `output` exists.
    ConfigError
        The run has no prior of slide levels.
    """
    if output.exists():
        remove_left_behind(output)  # by a process that was killed after it had written it
        raise DataError(f"{output} exists; give --output a folder that does not")
    run.paths.require_model()
    pipeline = HingePipeline.from_pretrained(run.folder, torch_dtype=torch.float32)
    model = pipeline.model
    if model.slide_prior is None:
        raise ConfigError(f"the model in {run.folder} has no prior of slide levels; train the run again to have one")
    slide = run.slide(name)
    values, sizes = read_observed(observed, slide, pipeline.genes, pipeline.settings.transform)
    spots = np.flatnonzero(np.isfinite(values).all(axis=1))
    if len(spots) < FEWEST_SPOTS:
        raise DataError(f"{observed} has {len(spots)} spots with all genes of the panel; adapting takes {FEWEST_SPOTS}")
    features = run.conditions(slide, run.features(slide))[:, 0]
    patient = patient or run.patient(name)
    given: float | str = "unknown" if library_size is None else library_size
    known = (pipeline.settings.shares, pipeline.tokens, pipeline.categories(slide))
    evidence, _ = slide_evidence(model, slide, pipeline.genes, patient, None, None, given, *known)
    inputs = pipeline.with_slide_effect(SlideInputs.of_slide(slide, features, values, sizes, evidence))
    effect = inputs.slide_effect
    assert isinstance(effect, LevelEffect)
    predicted, level = effect.slide.predicted(), effect.typical.level
    assert level is not None
    slope = effect.pattern[1].double().cpu().numpy()
    residual = (values[spots] - level) / slope - (predicted[spots] - predicted.mean(axis=0))
    scale = _adapt_regression(model, effect, features[spots], residual)
    _add_patient(model, effect, patient)
    _write(run, pipeline, output, patient, name)
    logger.info(
        "wrote %s: patient %s from %d spots, regression weights at scale %g", output, patient, len(spots), scale
    )
    return output


def _adapt_regression(model: HingeModel, effect: LevelEffect, features: NDArray, residual: NDArray) -> float:
    """Move the regression's weights to their posterior given residuals (n, G) at features (n, d); return the scale."""
    assert model.gene_factor_model is not None and model.slide_prior is not None
    regression, factors = model.slide_prior.regression, model.gene_factor_model
    coefficients = regression.coefficients(regression_condition(model, features).cpu())[:, :-1]
    residual = residual - residual.mean(axis=0)
    coefficients = coefficients - coefficients.mean(axis=0)
    loadings = factors.loadings.detach().cpu().double().numpy()
    variance = (loadings**2).sum(axis=1) + factors.log_noise.detach().cpu().double().exp().numpy()
    assert effect.log_scale is not None
    variance = variance * np.exp(2 * effect.log_scale) / effect.pattern[1].double().cpu().numpy() ** 2
    gram, likelihoods = coefficients @ coefficients.T, []
    for scale in SCALES:
        covariance = scale**2 * gram + np.eye(len(gram))
        _, determinant = np.linalg.slogdet(covariance)
        fit = (residual * np.linalg.solve(covariance, residual)).sum(axis=0) / variance
        likelihoods.append(-0.5 * (len(variance) * determinant + fit.sum()))
    best = SCALES[int(np.argmax(likelihoods))]
    moved = best**2 * coefficients.T @ np.linalg.solve(best**2 * gram + np.eye(len(gram)), residual)  # (R, G)
    along = regression.directions.cpu().double().numpy() * regression.deviations.cpu().double().numpy()
    change = (along @ moved).T / regression.width.cpu().double().numpy()  # (G, d)
    with torch.no_grad():
        factors.mean.weight += torch.from_numpy(change).to(factors.mean.weight)
        factors.mean.bias -= torch.from_numpy(change @ regression.centre.cpu().double().numpy()).to(factors.mean.bias)
    return best


def _add_patient(model: HingeModel, effect: LevelEffect, patient: str) -> None:
    """Add a patient, whose slides have the expected level of an effect, to the prior; replace one of that name."""
    old, level = model.slide_prior, effect.level
    assert old is not None and effect.typical.level is not None
    others = [number for number, name in enumerate(old.patients) if name != patient]
    new = SlidePrior(
        model.config.num_genes,
        [*(old.patients[number] for number in others), patient],
        len(old.regression.centre),
        len(old.token_shares),
    )
    variance = (level.loadings[:-1] ** 2).sum(axis=1) + level.noise[:-1]
    # as many sections as would leave the same uncertainty
    sections = float(old.array("section_noise").mean() / max(variance.mean(), 1e-9))
    own = {
        "patient_means": level.mean[None, :-1],
        "patient_values": effect.typical.level[None],
        "patient_sections": np.full((1, len(level.mean)), min(sections, 50.0)),
        "patient_library": level.mean[-1:],
    }
    state = old.state_dict()
    for name, content in own.items():
        state[name] = torch.cat([state[name][others], torch.from_numpy(content).to(state[name])])
    rank = new.patient_loadings.shape[1]
    loadings = state["patient_loadings"]
    state["patient_loadings"] = torch.nn.functional.pad(loadings, (0, max(0, rank - loadings.shape[1])))[:, :rank]
    new.load_state_dict(state)
    model.slide_prior = new.to(model.feature_mean.device)
    model.register_to_config(slide_patients=new.patients)


def _write(run: Run, pipeline: HingePipeline, output: Path, patient: str, slide: str) -> None:
    """Write the folder of a run with the model of a pipeline, and everything else of another run."""
    features = run.config.features
    folder = features.folder or (run.folder / "features").resolve()
    config = run.config.model_copy(
        update={"output": output.resolve(), "features": features.model_copy(update={"folder": folder})}
    )
    patients = {**pipeline.settings.patients, slide: patient}
    with atomic_path(output) as temporary:
        temporary.mkdir()
        checksums.start(temporary)
        save_config(config, temporary / "config.yaml")
        for file in (run.paths.panel, run.paths.genes, run.paths.environment):
            if file.exists():
                shutil.copy(file, temporary / file.name)
        if run.paths.backbone.is_relative_to(run.folder):
            shutil.copytree(run.paths.backbone, temporary / run.paths.backbone.name)
        pipeline.model.save_pretrained(temporary / "model")
        pipeline.scheduler.save_config(temporary / "model")
        split, index = read_json(run.paths.split), read_json(run.paths.index)
        write_json(temporary / run.paths.split.name, {**split, "patients": patients})
        index["settings"]["patients"] = patients
        write_json(temporary / run.paths.index.name, index)
        checksums.accept(temporary)
