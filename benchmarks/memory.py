"""GPU memory of training HINGE on a CellFM, by calculation: weights, gradients, Adam, and what autograd keeps.

Kept activations are counted, not guessed: hooks sum up what a forward pass in bfloat16 saves for the backward pass,
with two and with three layers and one spot; the difference is one layer and one spot.

    python benchmarks/memory.py --batch-size 32 --genes 200
"""

from typing import Annotated

import torch
import typer

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.models import HingeModel

FEATURES = 1536


def model_of(layers: int, rank: int | None, genes: int, device: str) -> HingeModel:
    with torch.device(device):
        backbone = CellFMModel(CellFMConfig(num_genes=genes, num_hidden_layers=layers))
        model = HingeModel(FEATURES, genes, 1536, layers, head="point", modulation_rank=rank, gene_factors=False)
    return model.attach_backbone(backbone.to(torch.bfloat16))


def saved_bytes(layers: int, genes: int, rank: int) -> tuple[int, int]:
    """What autograd keeps of one spot, beside the weights, and how much of it a checkpointed layer would (h alone)."""
    model = model_of(layers, rank, genes, "cpu").train()
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.backbone.parameters()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    values, visible = torch.rand(1, genes), torch.ones(1, genes)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        ids, step = torch.arange(1, genes + 1), torch.ones(1, dtype=torch.long)
        h = model.tokens(values, visible, step, torch.rand(1, FEATURES), ids)
    return sum(storage.nbytes() for storage in kept.values()), h.nbytes


def main(
    batch_size: Annotated[int, typer.Option(help="Spots in a batch.")] = 32,
    genes: Annotated[int, typer.Option(help="Genes of the panel.")] = 200,
    layers: Annotated[int, typer.Option(help="Layers of the backbone, 1536 wide.")] = 40,
) -> None:
    three, two = saved_bytes(3, genes, 1), saved_bytes(2, genes, 1)
    layer, h = three[0] - two[0], two[1]
    rest = two[0] - 2 * layer
    print(f"one layer keeps {layer / 1e6:.1f} MB a spot; checkpointed {h / 1e6:.1f} MB; the rest {rest / 1e6:.1f} MB")
    with torch.device("meta"):
        backbone = sum(parameter.numel() for parameter in CellFMModel(CellFMConfig()).parameters())
    print(f"frozen backbone: {backbone:,} weights, {2 * backbone / 1e9:.1f} GB in bfloat16")
    print("| modulation | trainable | with gradient and Adam | checkpointed layers | activations | sum |")
    print("| --- | --- | --- | --- | --- | --- |")
    for rank in (32, None):
        trainable = model_of(layers, rank, genes, "meta").num_parameters(only_trainable=True)
        # float32 weight, gradient and two moments, and the copy in bfloat16 that autocast makes
        fixed = (16 + 2) * trainable
        for checkpointed in (False, True):
            # of checkpointed layers one is recomputed at a time
            activations = layers * h + layer if checkpointed else layers * layer
            activations = batch_size * (activations + rest)
            total = 2 * backbone + fixed + activations
            print(
                f"| {f'rank {rank}' if rank else 'full'} | {trainable / 1e6:.0f} M ({trainable / backbone:.1%}) "
                f"| {fixed / 1e9:.1f} GB | {'yes' if checkpointed else 'no'} | {activations / 1e9:.1f} GB "
                f"| {total / 1e9:.1f} GB |"
            )


if __name__ == "__main__":
    typer.run(main)
