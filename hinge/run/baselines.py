"""The baseline stage: fit what a model is compared with, and keep its predictions with the run."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from hinge.data.draws import read_draws
from hinge.data.spots import SpotTable
from hinge.diffusion.defaults import DEFAULT_BATCH_SIZE
from hinge.evaluation.baselines import BASELINES_VERSION, baseline_predictions
from hinge.evaluation.completion import complete_spots
from hinge.evaluation.kept import PredictionStore, digest_of
from hinge.evaluation.names import BASELINES, GENERATIVE_BASELINES, LEVELLED, PRETRAINED
from hinge.evaluation.predictions import Prediction
from hinge.run.preparation import Preparation, spot_names
from hinge.run.training_spots import training_table
from hinge.utils.errors import DataError
from hinge.utils.files import file_digest
from hinge.utils.locks import lock_folder

logger = logging.getLogger(__name__)


def fit_baselines(inputs: Preparation, slides: Sequence[str]) -> dict[str, Path]:
    """Fit the baselines of the configuration and write what they predict of slides; what is finished is kept.

    A prediction is kept with a digest of everything it was made from, and made again if that has changed.

    Parameters
    ----------
    inputs
        The run.
    slides
        Names of the slides to predict.

    Returns
    -------
    dict
        Name of each slide → its file, see `hinge.evaluation.kept.PredictionStore`. A slide that cannot be read has
        none, unless it is the only one, which is an error.
    """
    methods = inputs.config.evaluation.baselines
    train = complete_spots(training_table(inputs), inputs.config.seed) if methods else None
    files = {}
    for name in slides:
        try:
            test = inputs.scored_spots(name)
        except DataError:
            if len(slides) == 1:
                raise
            continue  # the evaluation reports it
        files[name] = inputs.paths.baseline_predictions(name)
        if train is not None:
            _fit_of_slide(inputs, name, train, test, PredictionStore(files[name]))
    return files


def _fit_of_slide(inputs: Preparation, name: str, train: SpotTable, test: SpotTable, store: PredictionStore) -> None:
    """Add to `store` the predictions of a slide that are missing or outdated."""
    config, path = inputs.config, inputs.paths.samples(name)
    methods, num_draws = config.evaluation.baselines, config.sampling.draws
    levels = None
    if path.exists():
        draws = read_draws(path)
        num_draws = int(draws.uns["hinge"]["draws"])
        if "slide_level" in draws.varm:
            levels = np.asarray(draws.varm["slide_level"])[draws.var_names.get_indexer(test.genes)].T
    panel, every_gene = train.genes, train
    train = train.on_genes(test.genes)
    arrays = {
        "train_slide": np.asarray(train.slide, dtype=np.str_),
        "train_coords": train.coords,
        "train_features": train.features[:, 0],
        "train_values": train.values,
        "test_features": test.features[:, 0],
    }
    made_from = digest_of(arrays, BASELINES_VERSION, num_draws, config.seed)
    digests = {method: made_from for method in BASELINES if method in methods}
    if levels is None:
        digests.pop(LEVELLED, None)
    elif LEVELLED in digests:
        digests[LEVELLED] = digest_of({"levels": levels}, made_from)
    correlation = _pretrained_correlation(inputs) if PRETRAINED in digests else None
    if correlation is None:
        digests.pop(PRETRAINED, None)
    else:
        scored = [panel.index(gene) for gene in test.genes]
        correlation = correlation[np.ix_(scored, scored)]
        digests[PRETRAINED] = digest_of({"correlation": correlation}, made_from)
    missing = [method for method in digests if store.digest(method) != digests[method]]
    if missing:
        logger.info("fitting baselines: %s (%s)", ", ".join(missing), name)
        for prediction in baseline_predictions(
            train, test, missing, n_draws=num_draws, seed=config.seed, levels=levels, correlation=correlation
        ):
            store.put(prediction, digests[prediction.method])
    for method in (method for method in methods if method in GENERATIVE_BASELINES):
        model = _train_generative(inputs, method, every_gene)
        of_model = [(file.name, file_digest(file)) for file in sorted(model.glob("*.*"))]
        settings = (num_draws, config.sampling.seed, config.sampling.precision, spot_names(test))
        digest = digest_of({"features": test.features[:, 0]}, BASELINES_VERSION, of_model, *settings)
        if len(test.genes) < len(panel):
            digest = digest_of({"genes": np.array(test.genes)}, digest)
        if store.digest(method) != digest:
            logger.info("drawing from baseline: %s (%s)", method, name)
            store.put(_draw_generative(inputs, method, model, test, panel, num_draws), digest)
            missing.append(method)
    if missing:
        store.save()
        logger.info("wrote %s", store.path)


def _pretrained_correlation(inputs: Preparation) -> np.ndarray | None:
    """Return the correlations of the panel's genes in the counts that the backbone was pre-trained on."""
    from hinge.training.prior_covariance import prior_covariance

    backbone = inputs.backbone()
    prior = prior_covariance(backbone, inputs.gene_ids(backbone))
    return None if prior is None else prior.correlation()


def _train_generative(inputs: Preparation, method: str, train: SpotTable) -> Path:
    """Train the model of a generative baseline, unless it is finished; return its folder."""
    folder, config, settings = inputs.paths.baseline(method), inputs.config, inputs.config.backbone
    if (folder / "model" / "config.json").exists():
        return folder / "model"
    import torch

    from hinge.diffusion.gaussian import Denoiser, NoiseSchedule
    from hinge.models import HingeModel
    from hinge.models.tuning import cast_frozen
    from hinge.training import train_denoiser

    logger.info("fitting baselines: %s (trains a model)", method)
    backbone = inputs.backbone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = HingeModel.from_backbone(
            backbone,
            train.features.shape[2],
            train.values.shape[1],
            head="point",
            tuning=settings.tuning,
            standardise_features=config.features.standardise_slide,
            **config.model.model_dump(exclude={"head"}),
        )
    cast_frozen(model.backbone, torch.bfloat16 if config.training.precision == "bf16" else torch.float32)
    denoiser = Denoiser(model, NoiseSchedule(method), inputs.gene_ids(backbone), torch.from_numpy(train.values))
    with lock_folder(folder):
        train_denoiser(denoiser, train, config.training, folder / "training", seed=config.seed)
        denoiser.save_pretrained(folder / "model")
    logger.info("wrote %s", folder / "model")
    return folder / "model"


def _draw_generative(
    inputs: Preparation, method: str, model: Path, test: SpotTable, panel: list[str], num_draws: int
) -> Prediction:
    """Return the draws of a generative baseline, and as its mean theirs."""
    import torch

    from hinge.diffusion.gaussian import Denoiser, draw_gaussian
    from hinge.training.loop import make_accelerator
    from hinge.utils.memory import with_less_memory

    config, settings = inputs.config, inputs.config.sampling
    denoiser = Denoiser.from_pretrained(model, inputs.backbone())
    denoiser.model.backbone.to(torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    denoiser = denoiser.to(make_accelerator(config.training).device).eval()
    device = denoiser.mean.device
    draw = partial(
        draw_gaussian,
        denoiser,
        denoiser.schedule,
        torch.from_numpy(np.asarray(test.features[:, 0], dtype=np.float32)).to(device),
        spot_names(test),
        len(panel),
        num_draws=num_draws,
        seed=settings.seed,
    )
    draws, _ = with_less_memory(DEFAULT_BATCH_SIZE, lambda size: draw(batch_size=size))
    values = denoiser.expression(torch.from_numpy(draws).to(device)).clamp_min(0).cpu().numpy()
    values = values[..., [panel.index(gene) for gene in test.genes]]
    return Prediction(method, mean=values.mean(axis=0, dtype=np.float64), draws=values)
