"""Settings of the self-supervised pre-training of a histology encoder."""

from typing import Any, Literal

from pydantic import Field, model_validator

from hinge.training.loop import LoopConfig
from hinge.training.schedules import cosine
from hinge.utils.settings import Settings


class VitConfig(Settings):
    """The network: a ViT of timm, arguments that differ from its defaults, and the normalisation of pixels."""

    architecture: str = Field("vit_small_patch16_224", description="the name of a ViT in timm")
    arguments: dict[str, Any] = Field({}, description="arguments of timm's ViT, such as img_size, patch_size, depth")
    drop_path: float = Field(0.1, ge=0, lt=1, description="share of the student's residual branches left out")
    pooling: Literal["token", "avg"] = Field("token", description="what the encoder returns: class token or mean")
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    patch_um: float = Field(112.0, gt=0, description="side in µm of the squares that crops are taken from")
    dtype: Literal["float32", "float16"] = Field("float32", description="of the weights that are written")


class IbotConfig(LoopConfig):
    """Pre-training. A training row is a place on the tissue, of a grid of half a patch."""

    batch_size: int = Field(64, ge=1, description="the patches of a step, over all processes")
    learning_rate: float = Field(5e-4, gt=0, description="the largest learning rate, a number above 0")
    max_grad_norm: float = Field(3.0, gt=0, description="the norm that larger gradients are scaled down to")
    weight_decay: float = Field(0.04, ge=0, description="the weight decay at the start, of matrices and kernels")
    weight_decay_end: float = Field(0.4, ge=0, description="the weight decay at the end, reached on a cosine")
    teacher_momentum: float = Field(
        0.996, ge=0, lt=1, description="the share of the teacher that a step keeps at the start; 1 at the end"
    )
    teacher_temperature: float = Field(0.07, gt=0, description="the temperature of the teacher's softmax")
    teacher_temperature_start: float = Field(0.04, gt=0, description="that temperature at the start")
    teacher_temperature_steps: int = Field(0, ge=0, description="the steps from its start to its value")
    frozen_last_layer_steps: int | None = Field(
        None, ge=0, description="the first steps, in which prototypes do not change; null: the first epoch"
    )
    outputs: int = Field(8192, ge=2, description="the number of prototypes of a head")
    hidden: int = Field(2048, ge=1, description="the width of a head's hidden layers")
    bottleneck: int = Field(256, ge=1, description="the width of a head's last hidden layer")
    shared_head: bool = Field(False, description="whether class and masked tokens have one head")
    patch_loss_weight: float = Field(1.0, ge=0, description="the weight of the masked tokens' loss")
    global_scale: tuple[float, float] = Field((0.32, 1.0), description="least and largest area of a large crop")
    local_crops: int = Field(8, ge=0, description="the number of small crops of a patch")
    local_px: int = Field(96, ge=1, description="the side of a small crop in pixels")
    local_scale: tuple[float, float] = Field((0.05, 0.32), description="least and largest area of a small crop")
    stain_jitter: float = Field(0.2, ge=0, description="the largest relative change of a stain")
    masked_images: float = Field(0.5, gt=0, le=1, description="the share of large crops that are masked")
    masked_share: tuple[float, float] = Field((0.1, 0.5), description="least and largest share of their tokens")
    workers: int = Field(0, ge=0, description="the number of processes that read and augment patches")
    probe_spots: int = Field(1000, ge=20, description="the labelled spots that the probes see, at most")

    @model_validator(mode="after")
    def _possible(self):
        if self.ema_decay is not None or self.patience is not None:
            raise ValueError(
                "ema_decay and patience are not for pre-training: the teacher is the average of the weights"
            )
        for name in ("global_scale", "local_scale", "masked_share"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"{name} takes two shares above 0 and up to 1, the smaller first, not {low} and {high}"
                )
        return self

    def weight_decay_at(self, step: int, total: int) -> float:
        """Return the weight decay of a step."""
        return cosine(step, total, self.weight_decay, self.weight_decay_end)

    def momentum_at(self, step: int, total: int) -> float:
        """Return the share of the teacher that a step keeps."""
        return cosine(step, total, self.teacher_momentum, 1.0)

    def temperature_at(self, step: int) -> float:
        """Return the temperature of the teacher's softmax: linear from its start to its value."""
        if step >= self.teacher_temperature_steps:
            return self.teacher_temperature
        share = step / self.teacher_temperature_steps
        return self.teacher_temperature_start + share * (self.teacher_temperature - self.teacher_temperature_start)
