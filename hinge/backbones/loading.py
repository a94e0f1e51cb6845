"""Load an expression backbone by path."""

from pathlib import Path
from typing import Any

import torch

from hinge.backbones.cellfm import CellFMModel


def load_backbone(path: str | Path, dtype: torch.dtype | str | None = None, **options: Any) -> CellFMModel:
    """Load an expression backbone, frozen and in eval mode, on the CPU.

    Parameters
    ----------
    path
        A folder that `save_pretrained` or `hinge convert` wrote, `owner/name` on the Hugging Face Hub, or a file of
        published weights; see `CellFMModel.from_pretrained`.
    dtype
        Type of the weights; None: the stored type.
    options
        Further arguments of `CellFMModel.from_pretrained`.

    Returns
    -------
    CellFMModel
        A `transformers.PreTrainedModel` whose parameters take no gradient.

    Raises
    ------
    WeightsError
        The weights are missing, damaged or of another model.
    ConfigError
        An option is missing or does not fit the file.
    """
    return CellFMModel.from_pretrained(path, dtype=dtype, **options).requires_grad_(False)
