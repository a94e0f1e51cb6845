"""Passes of sampling through the modulated backbone, as CUDA graphs on a GPU."""

from functools import partial

import torch
from torch import Tensor

from hinge.models.hinge import HingeModel
from hinge.models.subset import GeneSubset
from hinge.utils.cuda_graphs import GraphedFunction

TOKENS_MULTIPLE = 16
"""Of the number of genes with tokens in a step on a GPU: a graph is of one shape, and few shapes are to occur."""


def graphed_tokens(model: HingeModel) -> GraphedFunction:
    """Return `HingeModel.tokens` of values, visible, timestep, features, gene ids, next visible, and `given` subset."""
    return GraphedFunction(partial(_tokens, model))


def genes_with_tokens(model: HingeModel, following: Tensor, visible: Tensor) -> GeneSubset | None:
    """Return the genes that need tokens in a step: those visible after it, for a model that drops the others.

    On a CPU in bfloat16 the last layer computes only those of them that were not visible before. In float32 the order
    of operations is that of the published code, and the host of a GPU is not to wait for a number.
    """
    if not model.drops_masked:
        return None
    if following.is_cuda:
        return GeneSubset.of(following, TOKENS_MULTIPLE)
    return GeneSubset.of(following, known=visible if model.backbone.dtype == torch.bfloat16 else None)


def given(subset: GeneSubset | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return index and present of a subset, and the numbers of the genes that are predicted, in place of all."""
    if subset is None:
        return None, None, None
    return subset.index, subset.present, None if subset.wanted is None else subset.predicted.index


def _tokens(
    model: HingeModel,
    values: Tensor,
    visible: Tensor,
    timestep: Tensor,
    features: Tensor,
    gene_ids: Tensor,
    following: Tensor,
    index: Tensor | None,
    present: Tensor | None,
    predicted: Tensor | None,
) -> Tensor:
    wanted = None if predicted is None else predicted.shape[1]
    subset = None if index is None and present is None else GeneSubset(index, present, wanted)
    return model.tokens(values, visible, timestep, features, gene_ids, following, subset)
