"""What the torch ports' constants cost a backbone that was trained with CellFM's: masked reconstruction, scored.

CellFM's LeakyReLU has slope 0.2 and its LayerNorm epsilon 1e-7 (MindSpore); the torch ports have 0.01 and 1e-5.

    python benchmarks/constants.py runs/her2st/backbone ../shared/her2st C2 C3 C4 C5 --transform log2p1
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from hinge.backbones import CellFMModel
from hinge.data.count_table import read_counts
from hinge.data.readers import read_slide

CONSTANTS = ((0.2, 1e-7), (0.2, 1e-5), (0.01, 1e-7), (0.01, 1e-5))


@torch.no_grad()
def reconstruction_error(model: CellFMModel, values: torch.Tensor, share: float, seed: int) -> tuple[float, float]:
    """Mean squared error on masked genes, values (n, G), a `share` of them masked: gene-wise and cell-wise decoder."""
    visible = (torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) >= share).float()
    ids, errors = torch.arange(1, values.shape[1] + 1), torch.zeros(2)
    for rows in torch.arange(len(values)).split(64):
        tokens = model(values[rows], visible[rows], ids)
        for k, decoded in enumerate((model.decode(tokens), model.decode_cell(tokens, ids))):
            errors[k] += ((1 - visible[rows]) * (decoded - values[rows]) ** 2).sum()
    return tuple((errors / (1 - visible).sum()).tolist())


def main(
    backbone: Annotated[Path, typer.Argument(help="Folder of a backbone pre-trained here.")],
    data: Annotated[Path, typer.Argument(help="Data set.")],
    samples: Annotated[list[str], typer.Argument(help="Samples that pre-training has not seen.")],
    transform: str = "log2p1",
    seed: int = 0,
) -> None:
    genes = CellFMModel.from_pretrained(backbone).config.gene_names
    slides = [read_slide(data, name, require_image=False) for name in samples]
    values = torch.from_numpy(read_counts(slides, genes).values(transform))
    print(f"{len(values)} spots, {len(genes)} genes, variance of a gene {values.var(dim=0).mean():.3f}")
    print("| slope | epsilon | masked | gene-wise MSE | cell-wise MSE |\n| --- | --- | --- | --- | --- |")
    for slope, eps in CONSTANTS:
        model = CellFMModel.from_pretrained(backbone, negative_slope=slope, layer_norm_eps=eps)
        for share in (0.2, 0.5, 0.9, 1.0):
            gene_wise, cell_wise = reconstruction_error(model, values, share, seed)
            print(f"| {slope} | {eps:g} | {share:.0%} | {gene_wise:.4f} | {cell_wise:.4f} |")


if __name__ == "__main__":
    typer.run(main)
