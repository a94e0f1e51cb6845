"""The settings of training; importing this module does not import torch."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hinge.utils.errors import ConfigError
from hinge.utils.settings import Settings

ScheduleName = Literal["constant", "cosine", "step"]


def _precision(value: Any) -> Any:
    if value is False:  # what YAML reads for a plain no
        return "no"
    if value == "fp16":
        raise ValueError("fp16 is not offered, because gradients overflow in it; choose bf16, or no for float32")
    return value


Precision = Annotated[Literal["no", "bf16"], BeforeValidator(_precision)]


class LoopConfig(Settings):
    """How something is optimised."""

    steps: int | None = Field(None, ge=1, description="a number of optimiser steps; null: epochs decides")
    epochs: int | None = Field(None, ge=1, description="a number of passes over the training rows, in place of steps")
    batch_size: int = Field(32, ge=1, description="the rows of a step, over all processes")
    learning_rate: float = Field(1e-4, gt=0, description="the largest learning rate, a number above 0")
    schedule: ScheduleName = Field(
        "cosine", description="constant, cosine (down to 0) or step (× 0.2 after 50 % and after 87.5 % of the run)"
    )
    warmup_steps: int = Field(0, ge=0, description="the steps over which the learning rate rises")
    precision: Precision = Field("no", description="no for float32, or bf16 for mixed precision")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="the decay of the weights' average; null: no average")
    evaluate_every: int | None = Field(None, ge=1, description="the steps between evaluations; null: once an epoch")
    evaluate_from: float = Field(0.0, ge=0, le=1, description="the share of the run before the first evaluation")
    patience: int | None = Field(None, ge=1, description="the evaluations without gain before the run ends early")
    checkpoint_every: int | None = Field(None, ge=1, description="the steps between checkpoints; null: once an epoch")
    tracker: Literal["none", "wandb", "tensorboard"] = Field("none", description="none, wandb or tensorboard")

    def num_steps(self, num_rows: int) -> int:
        """Return the optimiser steps of the whole run over `num_rows` training rows."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise ConfigError("give either steps or epochs")
        return self.epochs * self.steps_per_epoch(num_rows)

    def steps_per_epoch(self, num_rows: int) -> int:
        """Return the optimiser steps of one pass over `num_rows` training rows."""
        return math.ceil(num_rows / self.batch_size)


class TrainingConfig(LoopConfig):
    """Training of the conditioning layers and the value head."""

    epochs: int | None = Field(40, ge=1, description="a number of passes over the training rows; null with steps")
    learning_rate: float = Field(1e-3, gt=0, description="the largest learning rate, a number above 0")
    warmup_steps: int = Field(50, ge=0, description="the steps over which the learning rate rises")
    ema_decay: float | None = Field(
        0.999, gt=0, lt=1, description="the decay of the weights' average; null: no average"
    )
    warm_start_share: float = Field(
        0.125, ge=0, le=1, description="the share of the run, at its start, in which few genes are masked"
    )
    loss_on: Literal["masked", "revealed"] = Field(
        "masked", description="masked (all masked genes) or revealed (those that the step reveals)"
    )
    weighting: Literal["spot", "gene"] = Field(
        "spot", description="spot (all spots weigh the same) or gene (all masked genes of a batch weigh the same)"
    )
    validation_share: float = Field(0.1, ge=0, lt=1, description="the share of the training spots held out")
    validation_groups: Literal["spot", "tile", "slide"] = Field(
        "tile", description="what is held out as a whole: spot, tile (about 4 × 4 spots) or slide"
    )
    initialisation: bool = Field(True, description="whether the gene factors start from their closed-form solution")
    genes_per_step: int | None = Field(
        None, ge=1, description="the genes of a step, at random where the panel has more; null: all"
    )
    store: Literal["auto", "memory", "disk"] = Field(
        "auto",
        description="where training reads spots from: memory, disk (a store in the run's folder), or auto (disk where "
        "features and expression of all training spots have more than 4 GiB)",
    )
    spots_in_memory: int = Field(
        4000,
        ge=32,
        description="with a store: the spots that initialisation, validation and baselines use, at most",
    )
    gradient_checkpointing: bool = Field(
        False, description="whether layers are computed again in the backward pass, which saves memory"
    )
    compile: bool = Field(
        False, description="whether torch.compile compiles the step: a minute or two at the start, faster on a GPU"
    )


class PretrainConfig(Settings):
    """Masked-expression pre-training."""

    steps: int = Field(3000, ge=1, description="a number of optimiser steps")
    batch_size: int = Field(64, ge=1, description="the spots of a step, over all processes")
    learning_rate: float = Field(1e-3, gt=0, description="the largest learning rate, a number above 0")
    genes_per_step: int = Field(512, ge=1, description="the genes of a step, at random where the vocabulary has more")
    expression_prior: bool = Field(
        True, description="whether a CellFM corrects a factor model of the counts, fitted first in closed form"
    )
    precision: Precision = Field("no", description="no for float32, or bf16 for mixed precision")
    evaluate_every: int | None = Field(
        None, ge=1, description="the steps between evaluations, each with a checkpoint; null: once an epoch"
    )

    def loop(self) -> LoopConfig:
        """Return the settings of the training loop."""
        settings = self.model_dump(exclude={"genes_per_step", "expression_prior"})
        return LoopConfig(**settings, checkpoint_every=self.evaluate_every, warmup_steps=100, ema_decay=0.99)
