"""The evaluation stage: draws and predictions against measured slides, beside baselines."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hinge.data.draws import read_draws
from hinge.data.panel import read_panel
from hinge.data.readers import read_slide
from hinge.data.spots import SpotTable, load_spots
from hinge.diffusion.gaussian import Denoiser, NoiseSchedule, draw_gaussian
from hinge.diffusion.likelihood import chain_log_likelihood
from hinge.evaluation.baselines import Prediction
from hinge.evaluation.metrics.gene_sets import read_gene_sets
from hinge.evaluation.metrics.likelihood import marginal_log_likelihood, oracle_log_likelihood
from hinge.evaluation.names import BASELINES, GENERATIVE_BASELINES
from hinge.evaluation.oracle import oracle_prediction
from hinge.evaluation.predictions import PredictionFiles, read_prediction
from hinge.evaluation.scores import Evaluation, evaluate_slide, prediction_from_draws, write_scores
from hinge.models import HingeModel
from hinge.models.heads import COUNT_HEADS
from hinge.run.preparation import Preparation, spot_names
from hinge.run.sampling import load_pipeline
from hinge.training import train_denoiser
from hinge.training.loop import make_accelerator
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.locks import lock_folder
from hinge.utils.memory import with_less_memory

logger = logging.getLogger(__name__)


def evaluate_run(
    inputs: Preparation,
    slides: list[str] | None = None,
    predictions: list[PredictionFiles] | None = None,
    output: Path | None = None,
) -> Path:
    """Score slides and return the file of scores; see `Run.evaluate`."""
    paths, settings = inputs.paths, inputs.config.evaluation
    slides = slides or inputs.config.data.test
    if not slides:
        raise ConfigError(f"{paths.folder} names no test slides; give --slide")
    for name in slides:
        if not paths.samples(name).exists() and not predictions:
            raise DataError(f"there are no draws of {name} in {paths.folder / 'samples'}; run hinge sample first")
    gene_sets = None if settings.gene_sets is None else read_gene_sets(settings.gene_sets)
    train = inputs.spots(inputs.config.data.train)
    generative = [method for method in settings.baselines if method in GENERATIVE_BASELINES]
    denoisers = {method: _denoiser(inputs, method, train) for method in generative}
    evaluations, failed = [], {}
    for name in slides:
        try:
            test = inputs.spots([name])
        except DataError as error:
            if len(slides) == 1:
                raise
            logger.error("slide %s failed: %s", name, error)
            failed[name] = str(error)
            continue
        evaluations.append(_evaluate_slide(inputs, name, train, test, predictions or [], denoisers, gene_sets))
    if not evaluations:
        raise DataError(f"no slide could be scored: {'; '.join(failed.values())}")
    written = write_scores(output or paths.scores, evaluations)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(slides)} slides could not be scored, the others are in {written}: "
            + "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        )
    return written


def _evaluate_slide(
    inputs: Preparation,
    name: str,
    train: SpotTable,
    test: SpotTable,
    predictions: list[PredictionFiles],
    denoisers: dict[str, Denoiser],
    gene_sets: dict[str, tuple[str, ...]] | None,
) -> Evaluation:
    """Score everything that predicts one slide."""
    settings, seed, path = inputs.config.evaluation, inputs.config.seed, inputs.paths.samples(name)
    num_draws, own = inputs.config.sampling.draws, []
    if path.exists():
        draws = read_draws(path)
        num_draws = int(draws.uns["hinge"]["draws"])
        own.append(prediction_from_draws(draws, test))
    own += [read_prediction(files, test) for files in predictions]
    own += [_denoised(inputs, denoiser, method, test, num_draws) for method, denoiser in denoisers.items()]
    if "hinge_truth" in inputs.slide(name).uns:
        own.append(oracle_prediction(inputs.slide(name), test, num_draws, seed))
    return evaluate_slide(
        train,
        test,
        own,
        baselines=[method for method in settings.baselines if method in BASELINES],
        gene_sets=gene_sets,
        n_draws=num_draws,
        n_resamples=settings.bootstrap,
        seed=seed,
    )


def log_likelihoods(inputs: Preparation, name: str) -> dict[str, float] | None:
    """Return mean log-likelihoods of a slide's counts; see `Run.log_likelihoods`."""
    config = inputs.config
    if config.model.head not in COUNT_HEADS:
        return None
    pipeline, device = load_pipeline(inputs), make_accelerator(config.training).device
    pipeline.model.to(device)
    test, train = inputs.spots([name]), inputs.spots(config.data.train)
    of_model = chain_log_likelihood(
        pipeline.model,
        pipeline.scheduler,
        test.features[:, 0],
        inputs.gene_ids(pipeline.model.backbone),
        test.values,
        spot_names(test),
        seed=config.sampling.seed,
        library_size=None if pipeline.model.library_size_model is None else test.library_size,
    )
    means = {"model": of_model.mean(), "marginal": marginal_log_likelihood(train.counts, test.counts).mean()}
    slide = inputs.slide(name)
    if "hinge_truth" in slide.uns:
        means["oracle"] = oracle_log_likelihood(slide, test, seed=config.seed).mean()
        means["share"] = (means["model"] - means["marginal"]) / (means["oracle"] - means["marginal"])
    return {key: float(value) for key, value in means.items()}


def _denoiser(inputs: Preparation, method: str, train: SpotTable) -> Denoiser:
    """Return the denoiser of a generative baseline; trained, and kept in `baselines/`, if it is not there yet."""
    folder, config = inputs.paths.baseline(method), inputs.config
    backbone, settings = inputs.backbone(), config.backbone
    if (folder / "model" / HingeModel.config_name).exists():
        denoiser = Denoiser.from_pretrained(folder / "model", backbone)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = HingeModel.from_backbone(
                backbone,
                train.features.shape[2],
                train.values.shape[1],
                head="point",
                tuning=settings.tuning,
                lora_rank=settings.lora_rank,
                **config.model.model_dump(exclude={"head", "library_size"}),
            )
        model.cast_backbone(torch.bfloat16 if config.training.precision == "bf16" else torch.float32)
        values = torch.from_numpy(train.values)
        denoiser = Denoiser(model, NoiseSchedule(method), inputs.gene_ids(backbone), values)
        with lock_folder(folder):
            train_denoiser(denoiser, train, config.training, folder / "training", seed=config.seed)
            denoiser.save_pretrained(folder / "model")
        logger.info("wrote %s", folder / "model")
    denoiser.model.backbone.to(torch.bfloat16 if config.sampling.precision == "bf16" else torch.float32)
    return denoiser.to(make_accelerator(config.training).device).eval()


def _denoised(inputs: Preparation, denoiser: Denoiser, method: str, test: SpotTable, num_draws: int) -> Prediction:
    """Return the draws of a generative baseline; its mean is theirs."""
    device, settings = denoiser.mean.device, inputs.config.sampling
    draw = partial(
        draw_gaussian,
        denoiser,
        denoiser.schedule,
        torch.from_numpy(np.asarray(test.features[:, 0], dtype=np.float32)).to(device),
        spot_names(test),
        test.values.shape[1],
        num_draws=num_draws,
        seed=settings.seed,
    )
    draws, _ = with_less_memory(settings.batch_size, lambda size: draw(batch_size=size))
    values = denoiser.expression(torch.from_numpy(draws).to(device)).clamp_min(0).cpu().numpy()
    return Prediction(method, mean=values.mean(axis=0, dtype=np.float64), draws=values)


def evaluate_files(
    data: Path,
    samples: list[str],
    panel: Path,
    transform: str,
    predictions: list[PredictionFiles],
    output: Path,
    gene_sets: Path | None = None,
    seed: int = 0,
) -> Path:
    """Score predictions of other programs on measured slides, without a run: no baselines that need features.

    Parameters
    ----------
    data, samples
        Data set and its samples that were predicted.
    panel
        File with the genes that are scored.
    transform
        Units of the scores.
    predictions
        Where the predictions lie.
    output
        The file of scores to write.
    gene_sets
        File for the scores of modules; None for the built-in markers.
    seed
        Of the noise ceiling, folds and resamples.

    Returns
    -------
    Path
        `output`.
    """
    sets = None if gene_sets is None else read_gene_sets(gene_sets)
    genes, evaluations = read_panel(panel), []
    for name in samples:
        slide = read_slide(data, name, require_image=False)
        test = load_spots(slide, genes, transform)
        methods = [read_prediction(files, test) for files in predictions]
        if "hinge_truth" in slide.uns:
            methods.append(oracle_prediction(slide, test, seed=seed))
        evaluations.append(evaluate_slide(None, test, methods, gene_sets=sets, seed=seed))
    return write_scores(output, evaluations, reference=predictions[0].method)
