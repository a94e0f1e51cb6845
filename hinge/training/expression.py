"""Masked-expression pre-training of a backbone on counts alone."""

import copy
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PretrainedConfig

from hinge.backbones import ExpressionBackbone
from hinge.backbones.loading import load_backbone, random_backbone
from hinge.data.count_table import CountTable
from hinge.evaluation.masked_genes import lost_to, masked_gene_table, masked_gene_text
from hinge.training.count_augmentation import CountAugmentation
from hinge.training.expression_prior import fit_expression_prior, num_spot_factors
from hinge.training.halves import Part, halves
from hinge.training.loop import make_accelerator, run_loop, step_generator
from hinge.training.settings import PretrainConfig
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path, write_json
from hinge.utils.locks import lock_folder, remove_left_lock
from hinge.utils.threads import in_torch_threads

logger = logging.getLogger(__name__)

MIN_MASK_RATIO = 0.05
"""Mask ratios are uniform between this share of the genes and all of them."""

VALIDATION_SHARE = 0.1
REPORTED_GENES = 400


def pretrain_expression(
    table: CountTable,
    architecture: PretrainedConfig,
    config: PretrainConfig,
    folder: str | Path,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    continue_with: str = "the same command",
) -> ExpressionBackbone:
    """Pre-train a backbone to fill in masked genes.

    Each step masks a share of the genes of every spot and regresses their values from the visible ones (mean squared
    error), in the value space of the backbone: transformed counts for CellFM, ranks among all genes of the table for
    scGPT and Tahoe-x1. For CellFM a factor model of the counts is fitted first (`fit_expression_prior`); the network
    learns the difference from it. Counts are thinned and pooled at random, so that the model meets library sizes beyond
    those of the data. Whole patients are held out. On them, the error of masked genes is written beside that of linear
    models to `<folder>-training/masked_genes.json`, with a warning if the backbone is worse. A finished folder is
    loaded and returned; a stopped one is continued.

    Parameters
    ----------
    table
        Counts; its genes become the vocabulary, ids 1…G.
    architecture
        Kind and size of the model (`hinge.backbones.loading.new_config`); genes and size of the prior are set here.
    config, folder, seed
        `folder` gets the finished model for `from_pretrained`; log and checkpoint are beside it in
        `<folder>-training`.

    Returns
    -------
    ExpressionBackbone
        In eval mode, float32.

    Raises
    ------
    DataError
        Fewer than ten spots.
    ConfigError
        The folder holds a backbone of another architecture or of other genes, or an expression prior is asked of an
        architecture that has none.
    """
    folder = Path(folder)
    if len(table) < 10:
        raise DataError(f"pre-training needs at least 10 spots, there are {len(table)}")
    architecture.set_genes(list(table.genes))
    training_folder, loop = folder.with_name(f"{folder.name}-training"), config.loop()
    if (folder / "config.json").exists():
        remove_left_lock(training_folder)  # by a process that was killed after it had written the backbone
        return _finished(folder, architecture)

    accelerator = accelerator or make_accelerator(loop, training_folder)
    training, held = split_patients(table, seed)
    model = _new_model(table, training, architecture, config, seed)
    data = _MaskedRows(table, training, held, model, config, seed, accelerator.device)
    with lock_folder(training_folder):
        run_loop(
            _MaskedReconstruction(model),
            data.batch_loss,
            len(data.training),
            loop,
            training_folder,
            seed,
            evaluate=data.evaluate if len(data.held) else None,
            num_evaluation_rows=len(data.held),
            accelerator=accelerator,
            description="pre-training",
            continue_with=continue_with,
        )
        model = model.to("cpu").eval()
        if accelerator.is_main_process and len(data.held):
            _report(model, data, training_folder, seed)
        if len(data.held) and config.expression_prior:
            model = _with_all_rows(model, table, seed)
        if accelerator.is_main_process:
            with atomic_path(folder) as temporary:
                model.save_pretrained(temporary)
        accelerator.wait_for_everyone()
    return model


def split_patients(table: CountTable, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and the held-out rows.

    Whole patients are held out until they have `VALIDATION_SHARE` of the spots; whole samples where there are fewer
    than three patients; spots where there are fewer than three samples.
    """
    names = next((names for names in (table.patient, table.sample) if len(np.unique(names)) > 2), None)
    group = np.arange(len(table)) if names is None else np.unique(names, return_inverse=True)[1]
    order = torch.randperm(int(group.max()) + 1, generator=step_generator(seed, 10)).numpy()
    sizes = np.bincount(group)[order]
    # the first groups that have the share together
    num_held = int(np.searchsorted(np.cumsum(sizes), VALIDATION_SHARE * len(table))) + 1
    held = np.isin(group, order[:num_held])
    return np.flatnonzero(~held), np.flatnonzero(held)


def _finished(folder: Path, architecture: PretrainedConfig) -> ExpressionBackbone:
    """Return the backbone of a finished pre-training, which must be of this architecture and these genes."""
    model = load_backbone(folder)
    if model.config.model_type != architecture.model_type:
        raise ConfigError(
            f"{folder} holds a {model.config.model_type}, not a {architecture.model_type}; choose another folder"
        )
    known = model.config.read_vocabulary()
    if known is None or known.genes != architecture.read_vocabulary().genes:
        raise ConfigError(f"{folder} holds a backbone pre-trained on other genes; choose another folder")
    return model


def _new_model(
    table: CountTable, training: np.ndarray, architecture: PretrainedConfig, config: PretrainConfig, seed: int
) -> ExpressionBackbone:
    """Return a model with random weights and, for CellFM, the expression prior of the training rows."""
    if config.expression_prior:
        if architecture.model_type != "cellfm":
            raise ConfigError(
                f"a {architecture.model_type} has no expression prior; set expression_prior to false "
                "(backbone.pretrain.expression_prior)"
            )
        return _with_prior(table, training, architecture, seed)
    return random_backbone(architecture, seed)


def _with_prior(table: CountTable, rows: np.ndarray, architecture: PretrainedConfig, seed: int) -> ExpressionBackbone:
    """Return a model with random weights and the expression prior of some rows; its size is set in `architecture`."""
    transform = architecture.transform
    prior = fit_expression_prior(table.values(transform, rows), table.patient[rows], transform, seed)
    architecture.num_prior_factors = prior[1].shape[1]
    architecture.num_spot_factors = num_spot_factors(len(rows), len(table.genes))
    architecture.prior_library_size = float(np.median(table.library_size[rows]))
    model = random_backbone(architecture, seed)
    model.set_expression_prior(*prior)
    return model


def _with_all_rows(model: ExpressionBackbone, table: CountTable, seed: int) -> ExpressionBackbone:
    """Return a model with the same network and the expression prior of all rows.

    A further patient is worth more to the prior than to the network, which corrects it: on patients of neither, the
    error is that of a network trained on all (docs/results/pretraining.md).
    """
    refitted = _with_prior(table, np.arange(len(table)), copy.deepcopy(model.config), seed)
    own = refitted.state_dict()
    own.update({name: tensor for name, tensor in model.state_dict().items() if not name.startswith("expression_prior")})
    refitted.load_state_dict(own)
    return refitted.eval()


def _report(model: ExpressionBackbone, data: "_MaskedRows", folder: Path, seed: int) -> None:
    """Write and log the error of masked genes on the held-out rows, beside linear models of the same values."""
    table = data.table
    genes = np.arange(len(table.genes))
    if len(genes) > REPORTED_GENES:
        genes = np.sort(np.random.default_rng(seed).choice(genes, REPORTED_GENES, replace=False))
    held = {
        name: data.values(data.held[table.sample[data.held] == name])[:, genes]
        for name in np.unique(table.sample[data.held])
    }
    rows = masked_gene_table(backbone_predictor(model, genes + 1), data.values(data.training)[:, genes], held, seed)
    patients = sorted(set(table.patient[data.held]))
    units = getattr(model.config, "transform", model.value_space)
    write_json(folder / "masked_genes.json", {"held_out": patients, "transform": units, "rows": rows})
    logger.info("error of masked genes (%s), %s held out:\n%s", units, ", ".join(patients[:5]), masked_gene_text(rows))
    if lost_to(rows):
        logger.warning(
            "the backbone predicts masked genes worse than a linear-Gaussian model of the same counts (%s): "
            "raise backbone.pretrain.steps, or give more samples as data.pretrain",
            folder / "masked_genes.json",
        )


def backbone_predictor(model: ExpressionBackbone, gene_ids: np.ndarray, batch_size: int = 64):
    """Return the predictions of a backbone on genes with vocabulary ids (G,), for `masked_gene_table`."""
    ids = torch.from_numpy(np.asarray(gene_ids, dtype=np.int64))

    def predict(values: np.ndarray, visible: np.ndarray) -> np.ndarray:
        def part(start: int) -> torch.Tensor:
            rows = slice(start, start + batch_size)
            inputs = (torch.from_numpy(each[rows]).float() for each in (values, visible))
            with torch.no_grad():  # which holds for one thread
                return model.predict(*inputs, ids)

        starts = range(0, len(values), batch_size)
        return torch.cat(list(in_torch_threads(part, starts, "cpu"))).numpy()

    return predict


class _MaskedRows:
    """Spots whose genes are masked: the losses of training and of validation.

    Parameters
    ----------
    table
        Counts. A gene that a sample lacks is neither visible nor part of the loss.
    training, held
        Rows to train on and held-out rows.
    model
        It says what its values are.
    config
        Batch size, and the genes that one step sees.
    seed
        Of the masks.
    device
        Where the model is.
    """

    def __init__(
        self,
        table: CountTable,
        training: np.ndarray,
        held: np.ndarray,
        model: ExpressionBackbone,
        config: PretrainConfig,
        seed: int,
        device: torch.device,
    ):
        self.table, self.training, self.held = table, training, held
        self.config, self.seed, self.device = config, seed, device
        self.encode_values = model.encode_values
        # ranks depend on the genes that a step does not see, too
        self.ranks = model.value_space == "bins"
        self.known = torch.from_numpy(np.isfinite(table.counts))
        self.counts = torch.from_numpy(np.nan_to_num(table.counts, nan=0.0).astype(np.float32))
        self.library_size = torch.from_numpy(np.asarray(table.library_size, dtype=np.float32))
        self.augmentation = CountAugmentation(self.counts, self.library_size, table.sample, self.training)

    def genes(self, generator: torch.Generator) -> Tensor:
        """Return the sorted indices of the genes that a step sees: all, or `genes_per_step` at random."""
        num_genes = self.counts.shape[1]
        if num_genes <= self.config.genes_per_step:
            return torch.arange(num_genes)
        return torch.randperm(num_genes, generator=generator)[: self.config.genes_per_step].sort().values

    def counted(self, genes: Tensor) -> Tensor:
        """Return the genes whose counts the values of `genes` depend on."""
        return torch.arange(self.counts.shape[1]) if self.ranks else genes

    def values(self, rows: np.ndarray) -> np.ndarray:
        """Return values (n, G) of the model of some rows; NaN where a gene was not measured."""
        values = self.encode_values(self.counts[rows], self.library_size[rows])
        return values.masked_fill(~self.known[rows], torch.nan).numpy()

    def loss(
        self, module: nn.Module, counts: Tensor, library_size: Tensor, known: Tensor, genes: Tensor, hidden: Tensor
    ) -> Tensor:
        """Return the sum over spots of the mean error of their hidden genes.

        `counts` (B, n) are of the `counted` genes, `known` and `hidden` (B, G) of the step's genes (G,).
        """
        values = self.encode_values(counts, library_size)
        if self.ranks:
            values = values[:, genes]
        visible = (~hidden & known).float()
        target = (hidden & known).float()
        weight = target / target.sum(dim=1, keepdim=True).clamp_min(1)
        inputs = (values, visible, genes + 1)
        return (module(*(tensor.to(self.device) for tensor in inputs)) * weight.to(self.device)).sum()

    def batch_loss(self, module, step, rows, positions, generator) -> Tensor | list[Part]:
        """Return the loss of this process's rows, or of each half; see `BatchLoss`."""
        # everything random is drawn for the whole global batch on every process, then each takes its rows
        genes = self.genes(generator)
        hidden = _hidden(len(rows), len(genes), generator)
        counts, library_size = self.augmentation(self.training[rows], self.counted(genes), generator)
        known = self.known[self.training[rows]][:, genes]

        def loss(places: np.ndarray) -> Tensor:
            drawn = (counts[places], library_size[places], known[places], genes, hidden[places])
            return self.loss(module, *drawn) / len(rows)

        parts = halves(positions, len(rows), self.device)
        return loss(positions) if len(parts) == 1 else [partial(loss, part) for part in parts]

    def evaluate(self, module, rows) -> Tensor:
        """Return the sum of the losses of held-out rows, and their number."""
        total = torch.zeros(2)
        genes = self.genes(step_generator(self.seed, 11))
        for start in range(0, len(rows), self.config.batch_size):
            part = rows[start : start + self.config.batch_size]
            spots = self.held[part]
            # one generator a row: the masks of a held-out spot are the same on any number of processes
            masks = [_hidden(1, len(genes), step_generator(self.seed, 11, int(row))) for row in part]
            counts = self.counts[spots][:, self.counted(genes)]
            measured = (counts, self.library_size[spots], self.known[spots][:, genes])
            total += torch.tensor([self.loss(module, *measured, genes, torch.cat(masks)).item(), len(part)])
        return total


def _hidden(batch: int, num_genes: int, generator: torch.Generator) -> Tensor:
    """Return which genes of each spot are masked, bool (B, G)."""
    ratio = MIN_MASK_RATIO + (1 - MIN_MASK_RATIO) * torch.rand(batch, 1, generator=generator)
    return torch.rand(batch, num_genes, generator=generator) < ratio


class _MaskedReconstruction(nn.Module):
    """Squared errors of a model, in a forward so that several processes share gradients.

    The decoders of genes and of the whole cell are both trained, as published; with an expression prior, the former.
    """

    def __init__(self, model: ExpressionBackbone):
        super().__init__()
        self.model = model
        self.both = not getattr(model.config, "num_prior_factors", 0)
        # without gradient: what this pre-training does not use
        for name, parameter in model.named_parameters():
            unused = name.startswith(model.unused_parameters())
            if unused and not (self.both and name.startswith("cell_decoder")):
                parameter.requires_grad_(False)

    def forward(self, values: Tensor, visible: Tensor, gene_ids: Tensor) -> Tensor:
        """values, visible (B, G), gene_ids (G,) → error (B, G)."""
        tokens = self.model(values, visible, gene_ids)
        decoded = self.model.decode(tokens).float()
        expected = self.model.expected(values, visible, gene_ids)
        if expected is not None:
            return (expected + decoded - values) ** 2
        of_cell = self.model.decode_cell(tokens, gene_ids).float()
        return (decoded - values) ** 2 + (of_cell - values) ** 2
