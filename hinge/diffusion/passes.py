"""Passes of sampling through the modulated backbone, as CUDA graphs on a GPU."""

from functools import partial

from torch import Tensor

from hinge.models.hinge import HingeModel
from hinge.models.subset import GeneSubset
from hinge.utils.cuda_graphs import GraphedFunction

TOKENS_MULTIPLE = 16
"""Of the number of genes with tokens in a step on a GPU: a graph is of one shape, and few shapes are to occur."""


def graphed_tokens(model: HingeModel) -> GraphedFunction:
    """Return `HingeModel.tokens` of values, visible, timestep, features, gene ids, next visible, index and present.

    index and present are those of a `GeneSubset`, or both None.
    """
    return GraphedFunction(partial(_tokens, model))


def genes_with_tokens(model: HingeModel, following: Tensor) -> GeneSubset | None:
    """Return the genes that need tokens in a step: those visible after it, for a model that drops the others."""
    if not model.drops_masked:
        return None
    return GeneSubset.of(following, TOKENS_MULTIPLE if following.is_cuda else 1)


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
) -> Tensor:
    subset = None if index is None and present is None else GeneSubset(index, present)
    return model.tokens(values, visible, timestep, features, gene_ids, following, subset)
