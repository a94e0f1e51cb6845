"""The training stage: backbone and HingeModel."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from hinge.backbones import ExpressionBackbone, read_config
from hinge.backbones.loading import new_config, random_backbone
from hinge.backbones.packaged import packaged_for
from hinge.data.count_table import CountTable
from hinge.data.readers import require_samples
from hinge.data.spot_store import SpotStore
from hinge.data.spots import SpotTable
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.diffusion.pipeline import write_model_index
from hinge.models import HingeModel
from hinge.models.heads import needs_library_size
from hinge.models.pretrained import genes_digest
from hinge.models.tuning import cast_frozen
from hinge.run.paths import claim_folder, undone_on_error
from hinge.run.preparation import Preparation
from hinge.run.ranked_values import ranked_values
from hinge.run.training_spots import slide_levels, training_spots
from hinge.training import pretrain_expression, split_spots, spots_in_memory, train_hinge
from hinge.training.loop import make_accelerator
from hinge.utils import checksums
from hinge.utils.environment import write_environment
from hinge.utils.files import atomic_path, write_json
from hinge.utils.locks import lock_folder, remove_left_lock

logger = logging.getLogger(__name__)


def pretrain_backbone(inputs: Preparation) -> Path:
    """Make what is missing of panel and backbone, where that is pre-trained in this run; return its folder.

    Raises
    ------
    ConfigError
        The folder holds a run with other settings.
    """
    paths = inputs.paths
    with lock_folder(paths.folder):
        with undone_on_error(paths):
            claim_folder(inputs.config, paths)
            finished = (paths.backbone / "config.json").exists()
            counts = None if finished else inputs.pretraining_counts()
        if counts is not None:
            _pretrain(inputs, counts)
            logger.info("wrote %s", paths.backbone)
        return paths.backbone


def train_model(inputs: Preparation, checked: Sequence[str], allow: Collection[str] = ()) -> Path:
    """Make what is missing of panel, features, backbone and model; return the folder of the trained model.

    The slides `checked` are checked before; findings with a code in `allow` do not stop the training.

    Raises
    ------
    ConfigError
        The folder holds a run with other settings.
    """
    paths = inputs.paths
    if paths.has_model:
        claim_folder(inputs.config, paths)
        checksums.verified(paths.model)
        remove_left_lock(paths.folder)
        logger.info("%s is finished", paths.model)
        return paths.model
    with lock_folder(paths.folder):
        accelerator = make_accelerator(inputs.config.training, paths.training)
        # one process reads slides, selects genes and extracts features; the others then find them
        with accelerator.main_process_first(), undone_on_error(paths):
            claim_folder(inputs.config, paths)
            if accelerator.is_main_process:
                _check(inputs, checked, allow)
            spots, backbone, counts = _prepare(inputs)
            if accelerator.is_main_process:
                write_environment(paths.environment)
        if backbone is None:
            backbone = _pretrain(inputs, counts)
            accelerator = make_accelerator(inputs.config.training, paths.training)
        return _train(inputs, spots, backbone, accelerator)


def _check(inputs: Preparation, names: Sequence[str], allow: Collection[str]) -> None:
    """Check the names of slides, the encoder and the slides, in the order of the time it takes."""
    data = inputs.config.data
    require_samples(data.path, [*data.train, *data.test, *data.pretrain], data.format)
    _ = inputs.encoder
    inputs.check(names, allow)


def _prepare(inputs: Preparation) -> tuple[SpotTable | SpotStore, ExpressionBackbone | None, CountTable | None]:
    """Return training spots and the backbone, or the counts to pre-train it on; errors of the input are raised here."""
    data, settings = inputs.config.data, inputs.config.backbone
    spots = training_spots(inputs)
    if not inputs.paths.has_backbone:
        if settings.weights == "random":
            _write_random_backbone(inputs)
        elif not data.pretrain:
            _write_packaged_backbone(inputs)
    if not inputs.paths.has_backbone:
        return spots, None, inputs.pretraining_counts()
    backbone = inputs.backbone()
    inputs.gene_ids(backbone)
    return spots, backbone, None


def _pretrain(inputs: Preparation, counts: CountTable) -> ExpressionBackbone:
    settings = inputs.config.backbone
    wanted = new_config(transform=inputs.config.transform, **settings.size())
    return pretrain_expression(counts, wanted, settings.pretrain, inputs.paths.backbone, seed=inputs.config.seed)


def _write_packaged_backbone(inputs: Preparation) -> None:
    """Write the packaged backbone as that of the run, where it knows the panel."""
    genes = inputs.panel().genes
    wanted = new_config(transform=inputs.config.transform, **inputs.config.backbone.size())
    model = packaged_for(wanted, genes, inputs.config.seed)
    if model is None:
        return
    with atomic_path(inputs.paths.backbone) as temporary:
        model.save_pretrained(temporary)
    logger.info("wrote %s (hinge-cellfm-mini)", inputs.paths.backbone)


def _write_random_backbone(inputs: Preparation) -> None:
    """Write a backbone with the random weights that pre-training starts from."""
    settings, genes = inputs.config.backbone, inputs.panel().genes
    if settings.path is None:
        config = new_config(transform=inputs.config.transform, **settings.size())
        config.set_genes(genes)
    else:
        config = read_config(settings.path)
    model = random_backbone(config, inputs.config.seed)
    with atomic_path(inputs.paths.backbone) as temporary:
        model.save_pretrained(temporary)
    logger.info("wrote %s (random weights)", inputs.paths.backbone)


def _new_model(inputs: Preparation, spots: SpotTable | SpotStore, backbone: ExpressionBackbone) -> HingeModel:
    """Return an untrained model for some spots."""
    config = inputs.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = HingeModel.from_backbone(
            backbone,
            spots.feature_dim,
            len(spots.genes),
            transform=config.transform,
            tuning=config.backbone.tuning,
            library_size=needs_library_size(config.model.head, config.transform),
            standardise_features=config.features.standardise_slide,
            **config.model.model_dump(),
        )
    if model.value_bins is not None:
        most = config.training.spots_in_memory if isinstance(spots, SpotStore) else None
        values, bins = ranked_values(inputs, backbone, most)
        model.value_bins.fit(values, bins, backbone.config.gene_scale(inputs.gene_ids(backbone).numpy()))
    cast_frozen(model.backbone, torch.bfloat16 if config.training.precision == "bf16" else torch.float32)
    return model


def _train(
    inputs: Preparation, spots: SpotTable | SpotStore, backbone: ExpressionBackbone, accelerator: Accelerator
) -> Path:
    config, paths = inputs.config, inputs.paths
    # before the patients of the split are asked for: they are in the slides that are read here
    levels = slide_levels(inputs, spots) if config.model.gene_factors and config.training.initialisation else None
    model = _new_model(inputs, spots, backbone)
    model.register_to_config(panel_digest=genes_digest(inputs.panel().genes))
    scheduler = MaskedDiffusionScheduler(**config.diffusion.model_dump())
    if accelerator.is_main_process:
        _write_split(inputs, spots)
        frozen = sum(parameter.numel() for parameter in backbone.parameters() if not parameter.requires_grad)
        logger.info(
            "%s trainable parameters, %s frozen", f"{model.num_parameters(only_trainable=True):,}", f"{frozen:,}"
        )
    result = train_hinge(
        model,
        scheduler,
        inputs.gene_ids(backbone),
        spots,
        config.training,
        paths.training,
        seed=config.seed,
        accelerator=accelerator,
        levels=levels,
    )
    if accelerator.is_main_process:
        # before the model, which marks the run as trained
        write_model_index(paths.folder, model, scheduler, inputs.encoder, inputs.tokens)
        with atomic_path(paths.model) as temporary:
            model.to("cpu").save_pretrained(temporary)
            scheduler.save_config(temporary)
        logger.info("wrote %s (weights of step %s)", paths.model, result.best_step or result.step)
    accelerator.wait_for_everyone()
    return paths.model


def _write_split(inputs: Preparation, spots: SpotTable | SpotStore) -> None:
    """Write which slides serve what, the spot grid of the training slides, and the validation spots."""
    data, config = inputs.config.data, inputs.config.training
    table, _ = spots_in_memory(spots, config.spots_in_memory, inputs.config.seed)
    _, held = split_spots(table, config.validation_share, config.validation_groups, inputs.config.seed)
    write_json(
        inputs.paths.split,
        {
            "train": data.train,
            "test": data.test,
            "pretrain": data.pretrain,
            "patients": {name: inputs.patient(name) for name in [*data.train, *data.test, *data.pretrain]},
            **inputs.training_grid(),
            "validation_spots": [f"{table.slide[index]}/{table.barcodes[index]}" for index in held],
        },
    )
