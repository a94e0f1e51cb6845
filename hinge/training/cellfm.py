"""Masked-expression pre-training of a CellFM on counts alone."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.training.loop import LoopConfig, make_accelerator, run_loop, step_generator
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path
from hinge.utils.locks import lock_folder


class PretrainConfig(LoopConfig):
    """Masked-expression pre-training. Mask ratios are uniform in [min_mask_ratio, 1]."""

    steps: int | None = Field(3000, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    min_mask_ratio: float = Field(0.05, gt=0, le=1)
    genes_per_step: int = Field(2048, ge=2, description="genes of the vocabulary that one step sees")
    validation_share: float = Field(0.1, ge=0, lt=1)


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
        The finished model lies in `folder` as `from_pretrained` reads it, its log and checkpoint beside it in
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

    accelerator = accelerator or make_accelerator(config, folder.with_name(f"{folder.name}-training"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CellFMModel(architecture)
    known = torch.from_numpy(np.isfinite(values).astype(np.float32))
    filled = torch.from_numpy(np.nan_to_num(values, nan=0.0).astype(np.float32))
    order = torch.randperm(len(filled), generator=step_generator(seed, 10)).numpy()
    num_held = round(len(order) * config.validation_share)
    held, training = order[:num_held], order[num_held:]
    task = _MaskedReconstruction(model)

    def loss_of(module: nn.Module, rows: np.ndarray, positions: np.ndarray, generator: torch.Generator, scale: int):
        # the masks of the whole global batch are drawn on every process, then each takes its rows
        batch, num_genes = len(rows), filled.shape[1]
        chosen = torch.arange(num_genes)
        if num_genes > config.genes_per_step:
            chosen = torch.randperm(num_genes, generator=generator)[: config.genes_per_step].sort().values
        ratio = config.min_mask_ratio + (1 - config.min_mask_ratio) * torch.rand(batch, 1, generator=generator)
        hidden = torch.rand(batch, len(chosen), generator=generator) < ratio
        present = known[rows][:, chosen]
        visible = (~hidden).float() * present
        target = hidden.float() * present
        weight = target / target.sum(dim=1, keepdim=True).clamp_min(1)
        device = accelerator.device
        error = module(
            filled[rows][:, chosen][positions].to(device), visible[positions].to(device), (chosen + 1).to(device)
        )
        return (error * weight[positions].to(device)).sum() / scale

    def batch_loss(module, step, rows, positions, generator) -> Tensor:
        return loss_of(module, training[rows], positions, generator, scale=len(rows))

    def evaluate(module, rows) -> Tensor:
        total = torch.zeros(2)
        for start in range(0, len(rows), config.batch_size):
            part = rows[start : start + config.batch_size]
            loss = loss_of(module, held[part], np.arange(len(part)), step_generator(seed, 11, int(part[0])), scale=1)
            total += torch.tensor([loss.item(), float(len(part))])
        return total

    training_folder = folder.with_name(f"{folder.name}-training")
    with lock_folder(training_folder):
        run_loop(
            task,
            batch_loss,
            len(training),
            config,
            training_folder,
            seed,
            evaluate=evaluate if num_held else None,
            num_evaluation_rows=num_held,
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


class _MaskedReconstruction(nn.Module):
    """Squared errors of both decoders, in a forward so that several processes share gradients."""

    def __init__(self, model: CellFMModel):
        super().__init__()
        self.model = model
        # never part of the loss: rows that stand for padding, and tokens this pre-training does not use
        self.model.zero_token.requires_grad_(False)

    def forward(self, values: Tensor, visible: Tensor, gene_ids: Tensor) -> Tensor:
        """values, visible (B, G), gene_ids (G,) → error (B, G): gene-wise plus cell-wise."""
        tokens = self.model(values, visible, gene_ids)
        gene_wise = (self.model.decode(tokens).float() - values) ** 2
        cell_wise = (self.model.decode_cell(tokens, gene_ids).float() - values) ** 2
        return gene_wise + cell_wise
