"""Masked-expression pre-training of a CellFM on counts alone."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.training.loop import make_accelerator, run_loop, step_generator
from hinge.training.settings import PretrainConfig
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path
from hinge.utils.locks import lock_folder

MIN_MASK_RATIO = 0.05
"""Mask ratios are uniform between this share of the genes and all of them."""

GENES_PER_STEP = 2048
"""Genes of the vocabulary that one step sees at most."""

VALIDATION_SHARE = 0.1


def pretrain_expression(
    values: np.ndarray,
    genes: list[str],
    architecture: CellFMConfig,
    config: PretrainConfig,
    folder: str | Path,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    continue_with: str = "the same command",
) -> CellFMModel:
    """Pre-train a CellFM to fill in masked genes.

    Each step masks a share of the genes of every spot and regresses their values from the visible ones, with
    the gene-wise and the cell-wise decoder (mean squared error, as CellFM does). A finished folder is loaded
    and returned; a stopped one is continued.

    Parameters
    ----------
    values
        (n, G) expression of the spots or cells, in the units of the transform; NaN where a file lacks a gene.
    genes
        G symbols; they become the vocabulary, ids 1…G.
    architecture
        Size of the model; its `num_genes` and `gene_names` are set from `genes`.
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
        Fewer than ten spots, or shapes that do not fit.
    """
    folder = Path(folder)
    if values.ndim != 2 or values.shape[1] != len(genes):
        raise DataError(f"values of shape {values.shape} do not fit {len(genes)} genes")
    if len(values) < 10:
        raise DataError(f"pre-training needs at least 10 spots, there are {len(values)}")
    architecture.num_genes, architecture.gene_names = len(genes), list(genes)
    if (folder / "config.json").exists():
        model = CellFMModel.from_pretrained(folder)
        if model.config.gene_names != list(genes):
            raise ConfigError(f"{folder} holds a backbone pre-trained on other genes; choose another folder")
        return model.eval()

    training_folder, loop = folder.with_name(f"{folder.name}-training"), config.loop()
    accelerator = accelerator or make_accelerator(loop, training_folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CellFMModel(architecture)
    data = _MaskedRows(values, config.batch_size, seed, accelerator.device)
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
            with atomic_path(folder) as temporary:
                model.save_pretrained(temporary)
        accelerator.wait_for_everyone()
    return model


class _MaskedRows:
    """Spots whose genes are masked: the losses of training and of validation.

    Parameters
    ----------
    values
        (n, G); NaN where a file lacks a gene. Such a gene is neither visible nor part of the loss.
    batch_size
        Rows of one forward pass of validation.
    seed
        Of the split and of the masks.
    device
        Where the model is.
    """

    def __init__(self, values: np.ndarray, batch_size: int, seed: int, device: torch.device):
        self.known = torch.from_numpy(np.isfinite(values).astype(np.float32))
        self.filled = torch.from_numpy(np.nan_to_num(values, nan=0.0).astype(np.float32))
        self.batch_size, self.seed, self.device = batch_size, seed, device
        order = torch.randperm(len(values), generator=step_generator(seed, 10)).numpy()
        num_held = round(len(order) * VALIDATION_SHARE)
        self.held, self.training = order[:num_held], order[num_held:]

    def genes(self, generator: torch.Generator) -> Tensor:
        """Return the sorted indices of the genes that a step sees: all, or `GENES_PER_STEP` at random."""
        num_genes = self.filled.shape[1]
        if num_genes <= GENES_PER_STEP:
            return torch.arange(num_genes)
        return torch.randperm(num_genes, generator=generator)[:GENES_PER_STEP].sort().values

    def loss(self, module: nn.Module, spots: np.ndarray, genes: Tensor, hidden: Tensor) -> Tensor:
        """Return the sum over spots (B,) of the mean error of their genes that are hidden, bool (B, G)."""
        present = self.known[spots][:, genes]
        visible = (~hidden).float() * present
        target = hidden.float() * present
        weight = target / target.sum(dim=1, keepdim=True).clamp_min(1)
        inputs = (self.filled[spots][:, genes], visible, genes + 1)
        return (module(*(tensor.to(self.device) for tensor in inputs)) * weight.to(self.device)).sum()

    def batch_loss(self, module, step, rows, positions, generator) -> Tensor:
        """Return the loss of this process's rows; see `BatchLoss`."""
        # the masks of the whole global batch are drawn on every process, then each takes its rows
        genes = self.genes(generator)
        hidden = _hidden(len(rows), len(genes), generator)
        return self.loss(module, self.training[rows[positions]], genes, hidden[positions]) / len(rows)

    def evaluate(self, module, rows) -> Tensor:
        """Return the sum of the losses of held-out rows, and their number."""
        total = torch.zeros(2)
        genes = self.genes(step_generator(self.seed, 11))
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            # one generator a row: the masks of a held-out spot are the same on any number of processes
            masks = [_hidden(1, len(genes), step_generator(self.seed, 11, int(row))) for row in part]
            total += torch.tensor([self.loss(module, self.held[part], genes, torch.cat(masks)).item(), len(part)])
        return total


def _hidden(batch: int, num_genes: int, generator: torch.Generator) -> Tensor:
    """Return which genes of each spot are masked, bool (B, G)."""
    ratio = MIN_MASK_RATIO + (1 - MIN_MASK_RATIO) * torch.rand(batch, 1, generator=generator)
    return torch.rand(batch, num_genes, generator=generator) < ratio


class _MaskedReconstruction(nn.Module):
    """Squared errors of both decoders, in a forward so that several processes share gradients."""

    def __init__(self, model: CellFMModel):
        super().__init__()
        self.model = model
        # without gradient: rows of padding, and tokens that this pre-training does not use
        self.model.zero_token.requires_grad_(False)

    def forward(self, values: Tensor, visible: Tensor, gene_ids: Tensor) -> Tensor:
        """values, visible (B, G), gene_ids (G,) → error (B, G): gene-wise plus cell-wise."""
        tokens = self.model(values, visible, gene_ids)
        gene_wise = (self.model.decode(tokens).float() - values) ** 2
        cell_wise = (self.model.decode_cell(tokens, gene_ids).float() - values) ** 2
        return gene_wise + cell_wise
