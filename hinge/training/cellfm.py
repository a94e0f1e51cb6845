"""Masked-expression pre-training of a CellFM on counts alone."""

import logging
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.data.count_table import CountTable
from hinge.data.transforms import get_transform
from hinge.evaluation.masked_genes import lost_to, masked_gene_table, masked_gene_text
from hinge.training.count_augmentation import CountAugmentation
from hinge.training.expression_prior import fit_expression_prior, num_spot_factors
from hinge.training.loop import make_accelerator, run_loop, step_generator
from hinge.training.settings import PretrainConfig
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path, write_json
from hinge.utils.locks import lock_folder

logger = logging.getLogger(__name__)

MIN_MASK_RATIO = 0.05
"""Mask ratios are uniform between this share of the genes and all of them."""

VALIDATION_SHARE = 0.1
REPORTED_GENES = 400


def pretrain_expression(
    table: CountTable,
    architecture: CellFMConfig,
    config: PretrainConfig,
    folder: str | Path,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    continue_with: str = "the same command",
) -> CellFMModel:
    """Pre-train a CellFM to fill in masked genes.

    A factor model of the counts is fitted first (`fit_expression_prior`); the network learns the difference from it.
    Each step masks a share of the genes of every spot and regresses their values from the visible ones (mean squared
    error). Counts are thinned and pooled at random, so that the model meets library sizes beyond those of the data.
    Whole patients are held out. On them, the error of masked genes is written beside that of linear models to
    `<folder>-training/masked_genes.json`, with a warning if the backbone is worse. A finished folder is loaded and
    returned; a stopped one is continued.

    Parameters
    ----------
    table
        Counts; its genes become the vocabulary, ids 1…G.
    architecture
        Size of the model and its transform; `num_genes`, `gene_names` and `num_prior_factors` are set here.
    config, folder, seed
        `folder` gets the finished model for `from_pretrained`; log and checkpoint are beside it in
        `<folder>-training`.

    Returns
    -------
    CellFMModel
        In eval mode, float32.

    Raises
    ------
    DataError
        Fewer than ten spots.
    ConfigError
        The folder holds a backbone of other genes.
    """
    folder = Path(folder)
    if len(table) < 10:
        raise DataError(f"pre-training needs at least 10 spots, there are {len(table)}")
    architecture.num_genes, architecture.gene_names = len(table.genes), list(table.genes)
    if (folder / "config.json").exists():
        model = CellFMModel.from_pretrained(folder)
        if model.config.gene_names != list(table.genes):
            raise ConfigError(f"{folder} holds a backbone pre-trained on other genes; choose another folder")
        return model.eval()

    training_folder, loop = folder.with_name(f"{folder.name}-training"), config.loop()
    accelerator = accelerator or make_accelerator(loop, training_folder)
    data = _MaskedRows(table, architecture.transform, config, seed, accelerator.device)
    model = _new_model(data, architecture, config, seed)
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
        if accelerator.is_main_process:
            if len(data.held):
                _report(model, data, training_folder, seed)
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


def _new_model(data: "_MaskedRows", architecture: CellFMConfig, config: PretrainConfig, seed: int) -> CellFMModel:
    """Return a model with random weights and the expression prior of the training rows."""
    table, rows, transform = data.table, data.training, architecture.transform
    prior = None
    if config.expression_prior:
        prior = fit_expression_prior(table.values(transform, rows), table.patient[rows], transform, seed)
        architecture.num_prior_factors = prior[1].shape[1]
        architecture.num_spot_factors = num_spot_factors(len(rows), len(table.genes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CellFMModel(architecture)
    if prior is not None:
        model.set_expression_prior(*prior)
    return model


def _report(model: CellFMModel, data: "_MaskedRows", folder: Path, seed: int) -> None:
    """Write and log the error of masked genes on the held-out rows, beside linear models."""
    table, transform = data.table, data.transform
    genes = np.arange(len(table.genes))
    if len(genes) > REPORTED_GENES:
        genes = np.sort(np.random.default_rng(seed).choice(genes, REPORTED_GENES, replace=False))
    held = {
        name: table.values(transform, data.held[table.sample[data.held] == name])[:, genes]
        for name in np.unique(table.sample[data.held])
    }
    rows = masked_gene_table(
        backbone_predictor(model, genes + 1), table.values(transform, data.training)[:, genes], held, seed
    )
    patients = sorted(set(table.patient[data.held]))
    write_json(folder / "masked_genes.json", {"held_out": patients, "transform": transform, "rows": rows})
    logger.info("error of masked genes, %s held out:\n%s", ", ".join(patients[:5]), masked_gene_text(rows))
    if lost_to(rows):
        logger.warning(
            "the backbone predicts masked genes worse than a linear-Gaussian model of the same counts (%s): "
            "raise backbone.pretrain.steps, or give more samples as data.pretrain",
            folder / "masked_genes.json",
        )


def backbone_predictor(model: CellFMModel, gene_ids: np.ndarray, batch_size: int = 64):
    """Return the predictions of a backbone on genes with vocabulary ids (G,), for `masked_gene_table`."""
    ids = torch.from_numpy(np.asarray(gene_ids, dtype=np.int64))

    @torch.no_grad()
    def predict(values: np.ndarray, visible: np.ndarray) -> np.ndarray:
        parts = [
            model.predict(
                torch.from_numpy(values[start : start + batch_size]).float(),
                torch.from_numpy(visible[start : start + batch_size]).float(),
                ids,
            )
            for start in range(0, len(values), batch_size)
        ]
        return torch.cat(parts).numpy()

    return predict


class _MaskedRows:
    """Spots whose genes are masked: the losses of training and of validation.

    Parameters
    ----------
    table
        Counts. A gene that a sample lacks is neither visible nor part of the loss.
    transform
        Name of the transform of the model's values.
    config
        Batch size, and the genes that one step sees.
    seed
        Of the split and of the masks.
    device
        Where the model is.
    """

    def __init__(self, table: CountTable, transform: str, config: PretrainConfig, seed: int, device: torch.device):
        self.table, self.transform, self.config, self.seed, self.device = table, transform, config, seed, device
        self.known = torch.from_numpy(np.isfinite(table.counts))
        self.counts = torch.from_numpy(np.nan_to_num(table.counts, nan=0.0).astype(np.float32))
        self.library_size = torch.from_numpy(np.asarray(table.library_size, dtype=np.float32))
        self.training, self.held = split_patients(table, seed)
        self.augmentation = CountAugmentation(self.counts, self.library_size, table.sample, self.training)

    def genes(self, generator: torch.Generator) -> Tensor:
        """Return the sorted indices of the genes that a step sees: all, or `genes_per_step` at random."""
        num_genes = self.counts.shape[1]
        if num_genes <= self.config.genes_per_step:
            return torch.arange(num_genes)
        return torch.randperm(num_genes, generator=generator)[: self.config.genes_per_step].sort().values

    def loss(
        self, module: nn.Module, counts: Tensor, library_size: Tensor, known: Tensor, genes: Tensor, hidden: Tensor
    ) -> Tensor:
        """Return the sum over spots (B,) of the mean error of their genes that are hidden; all else (B, G)."""
        values = get_transform(self.transform).forward(counts, library_size)
        visible = (~hidden & known).float()
        target = (hidden & known).float()
        weight = target / target.sum(dim=1, keepdim=True).clamp_min(1)
        inputs = (values, visible, genes + 1)
        return (module(*(tensor.to(self.device) for tensor in inputs)) * weight.to(self.device)).sum()

    def batch_loss(self, module, step, rows, positions, generator) -> Tensor:
        """Return the loss of this process's rows; see `BatchLoss`."""
        # everything random is drawn for the whole global batch on every process, then each takes its rows
        genes = self.genes(generator)
        hidden = _hidden(len(rows), len(genes), generator)
        counts, library_size = self.augmentation(self.training[rows], genes, generator)
        known = self.known[self.training[rows]][:, genes]
        drawn = (counts[positions], library_size[positions], known[positions], genes, hidden[positions])
        return self.loss(module, *drawn) / len(rows)

    def evaluate(self, module, rows) -> Tensor:
        """Return the sum of the losses of held-out rows, and their number."""
        total = torch.zeros(2)
        genes = self.genes(step_generator(self.seed, 11))
        for start in range(0, len(rows), self.config.batch_size):
            part = rows[start : start + self.config.batch_size]
            spots = self.held[part]
            # one generator a row: the masks of a held-out spot are the same on any number of processes
            masks = [_hidden(1, len(genes), step_generator(self.seed, 11, int(row))) for row in part]
            measured = (self.counts[spots][:, genes], self.library_size[spots], self.known[spots][:, genes])
            total += torch.tensor([self.loss(module, *measured, genes, torch.cat(masks)).item(), len(part)])
        return total


def _hidden(batch: int, num_genes: int, generator: torch.Generator) -> Tensor:
    """Return which genes of each spot are masked, bool (B, G)."""
    ratio = MIN_MASK_RATIO + (1 - MIN_MASK_RATIO) * torch.rand(batch, 1, generator=generator)
    return torch.rand(batch, num_genes, generator=generator) < ratio


class _MaskedReconstruction(nn.Module):
    """Squared errors of a model, in a forward so that several processes share gradients.

    Without an expression prior, both decoders are trained, as CellFM does; with it, the gene-wise one.
    """

    def __init__(self, model: CellFMModel):
        super().__init__()
        self.model = model
        # without gradient: rows of padding, and tokens that this pre-training does not use
        self.model.zero_token.requires_grad_(False)
        if model.expression_prior is not None:
            self.model.cell_decoder.requires_grad_(False)

    def forward(self, values: Tensor, visible: Tensor, gene_ids: Tensor) -> Tensor:
        """values, visible (B, G), gene_ids (G,) → error (B, G)."""
        tokens = self.model(values, visible, gene_ids)
        decoded = self.model.decode(tokens).float()
        expected = self.model.expected(values, visible, gene_ids)
        if expected is not None:
            return (expected + decoded - values) ** 2
        cell_wise = (self.model.decode_cell(tokens, gene_ids).float() - values) ** 2
        return (decoded - values) ** 2 + cell_wise
