"""The evaluation stage: scores of draws, of other predictions and of baselines against measured slides."""

import logging
from collections.abc import Mapping
from pathlib import Path

from hinge.data.draws import read_draws
from hinge.data.panel import read_panel
from hinge.data.readers import read_slide
from hinge.data.spots import SpotTable, load_spots
from hinge.evaluation.completion import complete_spots
from hinge.evaluation.kept import KeptPrediction, PredictionStore
from hinge.evaluation.metrics.gene_sets import read_gene_sets
from hinge.evaluation.names import BASELINES, GENERATIVE_BASELINES, LEVELLED, PRETRAINED
from hinge.evaluation.oracle import oracle_prediction
from hinge.evaluation.predictions import Prediction, PredictionFiles, prediction_from_draws, read_prediction
from hinge.evaluation.scores import evaluate_slide
from hinge.evaluation.tables import write_scores
from hinge.run.preparation import Preparation, spot_names
from hinge.run.training_spots import training_table
from hinge.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def slides_to_evaluate(
    inputs: Preparation, slides: list[str] | None, predictions: list[PredictionFiles] | None
) -> list[str]:
    """Return the names of the slides, by default the test slides.

    Raises
    ------
    DataError
        A slide has neither draws nor other predictions.
    """
    paths, slides = inputs.paths, slides or inputs.config.data.test
    if not slides:
        raise ConfigError(f"{paths.folder} names no test slides; give --slide")
    for name in slides:
        if not paths.samples(name).exists() and not predictions:
            raise DataError(f"there are no draws of {name} in {paths.folder / 'samples'}; run hinge sample first")
    return slides


def evaluate_run(
    inputs: Preparation,
    slides: list[str],
    baselines: Mapping[str, Path],
    predictions: list[PredictionFiles] | None = None,
    output: Path | None = None,
) -> Path:
    """Score slides and return the file of scores; see `Run.evaluate`. `baselines` is from `fit_baselines`."""
    paths, settings = inputs.paths, inputs.config.evaluation
    gene_sets = None if settings.gene_sets is None else read_gene_sets(settings.gene_sets)
    evaluations, failed = [], {}
    for name in slides:
        try:
            test = inputs.scored_spots(name)
        except DataError as error:
            if len(slides) == 1:
                raise
            logger.error("slide %s failed: %s", name, error)
            failed[name] = str(error)
            continue
        evaluations.append(
            evaluate_slide(
                None,
                test,
                _predictions(inputs, name, test, predictions or [], baselines[name]),
                gene_sets=gene_sets,
                n_resamples=settings.bootstrap,
                seed=inputs.config.seed,
                kept=paths.kept_scores(name),
            )
        )
    if not evaluations:
        raise DataError(f"no slide could be scored: {'; '.join(failed.values())}")
    written = write_scores(output or paths.scores, evaluations)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(slides)} slides could not be scored, the others are in {written}: "
            + "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        )
    return written


def _predictions(
    inputs: Preparation, name: str, test: SpotTable, files: list[PredictionFiles], baselines: Path
) -> list[Prediction | KeptPrediction]:
    """Return all predictions of one slide: the draws of the run, those of other programs, baselines and oracle."""
    methods, path = inputs.config.evaluation.baselines, inputs.paths.samples(name)
    num_draws = inputs.config.sampling.draws
    predictions: list[Prediction | KeptPrediction] = []
    if path.exists():
        draws = read_draws(path)
        num_draws = int(draws.uns["hinge"]["draws"])
        predictions.append(prediction_from_draws(draws, test))
    predictions += [read_prediction(one, test) for one in files]
    store = PredictionStore(baselines)
    predictions += [store.kept(method) for method in methods if method in GENERATIVE_BASELINES]
    slide = inputs.slide(name)
    if "hinge_truth" in slide.uns:
        predictions.append(oracle_prediction(slide, test, num_draws, inputs.config.seed))
    fitted = [method for method in BASELINES if method in methods]
    # draws of a model without a prior of slide levels give no level, and not every backbone has correlations
    optional = (LEVELLED, PRETRAINED)
    return predictions + [store.kept(each) for each in fitted if each not in optional or store.digest(each) is not None]


def log_likelihoods(inputs: Preparation, name: str) -> dict[str, float] | None:
    """Return mean log-likelihoods of a slide's counts; see `Run.log_likelihoods`."""
    from hinge.diffusion.likelihood import chain_log_likelihood
    from hinge.evaluation.metrics.likelihood import marginal_log_likelihood, oracle_log_likelihood
    from hinge.models.options import COUNT_HEADS
    from hinge.run.sampling import load_pipeline
    from hinge.training.loop import make_accelerator

    config = inputs.config
    if config.model.head not in COUNT_HEADS:
        return None
    pipeline, device = load_pipeline(inputs), make_accelerator(config.training).device
    pipeline.model.to(device)
    test, train = inputs.spots([name], "mask"), complete_spots(training_table(inputs), config.seed)
    scored = inputs.scored_spots(name)
    of_model = chain_log_likelihood(
        pipeline.model,
        pipeline.scheduler,
        test.features[:, 0],
        inputs.gene_ids(pipeline.model.backbone),
        test.values,
        spot_names(test),
        seed=config.sampling.seed,
        library_size=None if pipeline.model.library_size_model is None else test.library_size,
        measured=test.measured.get(name),
    )
    of_marginal = marginal_log_likelihood(train.on_genes(scored.genes).counts, scored.counts)
    means = {"model": of_model.mean(), "marginal": of_marginal.mean()}
    slide = inputs.slide(name)
    if "hinge_truth" in slide.uns:
        means["oracle"] = oracle_log_likelihood(slide, scored, seed=config.seed).mean()
        means["share"] = (means["model"] - means["marginal"]) / (means["oracle"] - means["marginal"])
    return {key: float(value) for key, value in means.items()}


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
