"""Self-supervised pre-training of a histology encoder on H&E patches, by iBOT.

A student ViT sees crops of a patch, the large ones with blocks of tokens masked; a teacher, the student's moving
average, sees the large crops whole. The student's class token of each crop shall say what the teacher's says of the
other large crops (DINO [1]_), and its masked tokens what the teacher's say at their places (iBOT [2]_). Losses, heads,
masks and the ViT that takes masks are lightly's.

.. [1] Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021.
.. [2] Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022.
"""

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from accelerate import Accelerator
from anndata import AnnData
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset

from hinge.data.patches import PatchReader
from hinge.data.tissue_patches import TissuePatches
from hinge.encoders.encoder import Encoder
from hinge.encoders.registry import load_encoder
from hinge.training.augmentation import CROP_DRAWS, STAIN_DRAWS, Crops, jitter_stains, random_crops
from hinge.training.loop import LoopConfig, batch_rows, make_accelerator, run_loop, step_generator
from hinge.training.schedules import cosine
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path, read_json, write_json
from hinge.utils.locks import lock_folder
from hinge.utils.packages import require

logger = logging.getLogger(__name__)

NEIGHBOURS = 20
"""Neighbours of the kNN probe."""


class VitConfig(BaseModel):
    """The network: a timm ViT, what is different about it, and how pixels reach it."""

    model_config = ConfigDict(extra="forbid")

    architecture: str = "vit_small_patch16_224"
    arguments: dict[str, Any] = Field({}, description="arguments of timm's ViT, such as img_size, patch_size, depth")
    drop_path: float = Field(0.1, ge=0, lt=1, description="share of the student's residual branches left out")
    pooling: Literal["token", "avg"] = Field("token", description="what the encoder returns: class token or mean")
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    patch_um: float = Field(112.0, gt=0, description="side in µm of the squares that crops are taken from")
    dtype: Literal["float32", "float16"] = Field("float32", description="of the weights that are written")


class IbotConfig(LoopConfig):
    """Pre-training; epochs are of the places that a grid of half a patch puts on the tissue."""

    epochs: int | None = Field(None, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    max_grad_norm: float = Field(3.0, gt=0)
    weight_decay: float = Field(0.04, ge=0)
    weight_decay_end: float = Field(0.4, ge=0, description="reached on a cosine")
    teacher_momentum: float = Field(0.996, ge=0, lt=1, description="at the start; 1 at the end, on a cosine")
    teacher_temperature: float = Field(0.07, gt=0)
    teacher_temperature_start: float = Field(0.04, gt=0)
    teacher_temperature_steps: int = Field(0, ge=0, description="steps from its start to its value")
    frozen_last_layer_steps: int | None = Field(None, ge=0, description="None: the first epoch")
    outputs: int = Field(8192, ge=2, description="prototypes of a head")
    hidden: int = Field(2048, ge=1, description="width of a head")
    bottleneck: int = Field(256, ge=1)
    shared_head: bool = Field(False, description="one head for class and masked tokens")
    patch_loss_weight: float = Field(1.0, ge=0)
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_crops: int = Field(8, ge=0)
    local_px: int = Field(96, ge=1)
    local_scale: tuple[float, float] = (0.05, 0.32)
    stain_jitter: float = Field(0.2, ge=0)
    masked_images: float = Field(0.5, gt=0, le=1, description="share of large crops that are masked")
    masked_share: tuple[float, float] = Field((0.1, 0.5), description="least and largest share of their tokens")
    workers: int = Field(0, ge=0, description="processes that read and augment patches")
    probe_spots: int = Field(1000, ge=20, description="most labelled spots that the probes see")

    @model_validator(mode="after")
    def _possible(self):
        if self.ema_decay is not None or self.patience is not None:
            raise ValueError("ema_decay and patience are not for pre-training: the teacher is its average")
        for name in ("global_scale", "local_scale", "masked_share"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"{name} takes two shares above 0 and up to 1, the smaller first, not {low} and {high}"
                )
        return self

    def weight_decay_at(self, step: int, total: int) -> float:
        return cosine(step, total, self.weight_decay, self.weight_decay_end)

    def momentum_at(self, step: int, total: int) -> float:
        """Share of the teacher that a step keeps."""
        return cosine(step, total, self.teacher_momentum, 1.0)

    def temperature_at(self, step: int) -> float:
        """Of the teacher's softmax: linear from its start to its value."""
        if step >= self.teacher_temperature_steps:
            return self.teacher_temperature
        share = step / self.teacher_temperature_steps
        return self.teacher_temperature_start + share * (self.teacher_temperature - self.teacher_temperature_start)


@dataclass
class Probe:
    """Labelled spots by which pre-training is watched.

    Attributes
    ----------
    patches
        uint8 (n, px, px, 3).
    labels
        (n,) classes.
    is_test
        (n,) which spots are asked; the others are known.
    """

    patches: np.ndarray
    labels: np.ndarray
    is_test: np.ndarray

    def accuracies(self, features: np.ndarray) -> dict[str, float]:
        """Share of test spots whose class a kNN (cosine) and a logistic regression find from features (n, d)."""
        known, asked = features[~self.is_test], features[self.is_test]
        classes, truth = self.labels[~self.is_test], self.labels[self.is_test]
        knn = KNeighborsClassifier(min(NEIGHBOURS, len(known)), weights="distance")
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        most_frequent = np.unique(classes, return_counts=True)
        return {
            "knn_accuracy": float(knn.fit(normalize(known), classes).score(normalize(asked), truth)),
            "linear_accuracy": float(linear.fit(known, classes).score(asked, truth)),
            "chance": float((truth == most_frequent[0][most_frequent[1].argmax()]).mean()),
        }


def make_probe(
    slides: Sequence[AnnData], labels: Sequence[np.ndarray], patch_um: float, patch_px: int, most: int, seed: int
) -> Probe:
    """Read the patches of labelled spots.

    Parameters
    ----------
    slides, labels
        Slides and the classes of their spots, (n,) each. The last slide is asked and the others are known; of a
        single slide, the half with larger y is asked.
    patch_um, patch_px
        Size of a patch.
    most
        Most spots that are taken, at random by `seed`.

    Raises
    ------
    DataError
        There are fewer than two classes among the known spots.
    """
    patches, is_test, order = [], [], step_generator(seed, 31)
    chosen = []
    for number, slide in enumerate(slides):
        rows = np.sort(torch.randperm(slide.n_obs, generator=order).numpy()[: max(1, most // len(slides))])
        part = slide[rows]
        own = np.empty((len(rows), patch_px, patch_px, 3), dtype=np.uint8)
        for places, read in PatchReader(part, patch_um, patch_px):
            own[places] = read
        y = np.asarray(part.obsm["spatial"])[:, 1]
        is_test.append(y > np.median(y) if len(slides) == 1 else np.full(len(rows), number == len(slides) - 1))
        patches.append(own)
        chosen.append(np.asarray(labels[number])[rows])
    probe = Probe(np.concatenate(patches), np.concatenate(chosen), np.concatenate(is_test))
    if len(np.unique(probe.labels[~probe.is_test])) < 2:
        raise DataError("the probe's spots are all of one class")
    return probe


def block_masks(
    images: int, grid: tuple[int, int], masked_images: float, share: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Which tokens are hidden from the student, in blocks.

    Parameters
    ----------
    images
        Number of images, n.
    grid
        Rows and columns of tokens.
    masked_images
        Share of the images that are masked, at least one is.
    share
        Least and largest share of their tokens.
    generator
        Decides everything.

    Returns
    -------
    Tensor
        bool (n, rows, columns), True for hidden.
    """
    from lightly.models.utils import random_block_mask

    tokens = grid[0] * grid[1]
    # lightly draws from Python's global generator: set it, and give it back as it was
    before = random.getstate()
    random.seed(int(torch.randint(2**62, (1,), generator=generator)))
    try:
        masks = random_block_mask(
            (images, *grid),
            batch_mask_ratio=max(masked_images, 1 / images),
            min_image_mask_ratio=share[0],
            max_image_mask_ratio=share[1],
            min_num_masks_per_block=max(1, min(4, int(share[0] * tokens))),
            max_num_masks_per_block=tokens,
        )
    finally:
        random.setstate(before)
    return masks


def build_vit(config: VitConfig, drop_path: float = 0.0) -> VisionTransformer:
    """The ViT, freshly initialised; it takes images of any size that is a multiple of its patches.

    Raises
    ------
    ConfigError
        timm has no such ViT, or it has no class token.
    """
    settings = {"num_classes": 0, "global_pool": config.pooling, "dynamic_img_size": True, **config.arguments}
    if config.pooling == "avg":
        settings["fc_norm"] = False  # the norm stays where a class token has it too
    try:
        vit = timm.create_model(config.architecture, drop_path_rate=drop_path, **settings)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"timm cannot build {config.architecture} with {config.arguments}: {error}") from error
    if not isinstance(vit, VisionTransformer) or not vit.has_class_token:
        raise ConfigError(f"{config.architecture} is no ViT with a class token, which iBOT needs")
    return vit


class _Branch(nn.Module):
    """ViT and heads, once as student and once as teacher."""

    def __init__(self, vit: VisionTransformer, config: IbotConfig):
        from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM

        super().__init__()
        # timm's own initialisation and learnt positions
        self.vit = MaskedVisionTransformerTIMM(vit, weight_initialization="skip", pos_embed_initialization="skip")
        nn.init.trunc_normal_(self.vit.mask_token, std=0.02)
        size = (vit.embed_dim, config.hidden, config.bottleneck, config.outputs)
        self.class_head = DINOProjectionHead(*size)
        self.patch_head = self.class_head if config.shared_head else DINOProjectionHead(*size)

    def tokens(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), mask bool (B, h, w) → class token (B, D), patch tokens (B, h·w, D)."""
        prefix = self.vit.vit.num_prefix_tokens
        if mask is not None:
            hidden = mask.flatten(1)
            mask = torch.cat([hidden.new_zeros(len(hidden), prefix), hidden], dim=1)
        encoded = self.vit.encode(images, mask=mask)
        return encoded[:, 0], encoded[:, prefix:]


class _TokenCenter(nn.Module):
    """Running mean of the teacher's outputs for masked tokens, in place of lightly's.

    Processes have different numbers of masked tokens: lightly's averages the means of the processes, and so depends on
    how many there are.
    """

    value: Tensor

    def __init__(self, outputs: int, momentum: float):
        super().__init__()
        self.register_buffer("value", torch.zeros(1, outputs))
        self.momentum = momentum

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Outputs (N, K) of all of this process's masked tokens."""
        total = torch.cat([x.sum(dim=0), x.new_tensor([len(x)])])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
        self.value = self.momentum * self.value + (1 - self.momentum) * (total[:-1] / total[-1])


class Ibot(nn.Module):
    """Student, teacher and both losses, in a forward so that several processes share gradients."""

    def __init__(self, vit: VitConfig, config: IbotConfig):
        require("lightly", "pretrain", "pre-training an encoder")
        from lightly.loss import DINOLoss, IBOTPatchLoss

        super().__init__()
        self.student = _Branch(build_vit(vit, vit.drop_path), config)
        self.teacher = _Branch(build_vit(vit), config).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.class_loss = DINOLoss(config.outputs)
        self.patch_loss = IBOTPatchLoss(config.outputs)
        self.patch_loss.center = _TokenCenter(config.outputs, self.patch_loss.center.momentum)
        self.patch_loss_weight = config.patch_loss_weight
        self.register_buffer("mean", torch.tensor(vit.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(vit.std).view(3, 1, 1), persistent=False)
        self.carried = nn.ModuleDict(
            {"teacher": self.teacher, "class_loss": self.class_loss, "patch_loss": self.patch_loss}
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a large crop's tokens."""
        return tuple(self.student.vit.vit.patch_embed.grid_size)

    @property
    def image_px(self) -> int:
        """Side of a large crop in pixels."""
        return self.student.vit.vit.patch_embed.img_size[0]

    @property
    def last_layers(self) -> list[nn.Module]:
        """The student's prototypes."""
        return [self.student.class_head.last_layer, self.student.patch_head.last_layer]

    def train(self, mode: bool = True) -> "Ibot":
        """The teacher is never in training mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, large: Tensor, small: Tensor, mask: Tensor, temperature: float) -> dict[str, Tensor]:
        """Both losses, a mean over patches.

        Parameters
        ----------
        large
            (2, B, 3, H, H) crops in [0, 1].
        small
            (n, B, 3, h, h) crops in [0, 1]; n may be 0.
        mask
            bool (2, B, rows, columns): what the student does not see of the large crops.
        temperature
            Of the teacher's softmax.
        """
        batch = large.shape[1]
        large, small = (self._normalise(crops).flatten(0, 1) for crops in (large, small))
        mask = mask.flatten(0, 1)
        hidden = mask.flatten(1)
        with torch.no_grad():
            taught, taught_patches = self.teacher.tokens(large)
            taught = self.teacher.class_head(taught).float()
            taught_patches = self.teacher.patch_head(taught_patches[hidden]).float()
        classes, patches = self.student.tokens(large, mask)
        if len(small):
            classes = torch.cat([classes, self.student.tokens(small)[0]])
        classes = self.student.class_head(classes).float()
        patches = self.student.patch_head(patches[hidden]).float()
        # products of probabilities: not in half precision
        with torch.autocast(large.device.type, enabled=False):
            return {
                "class_loss": self.class_loss(list(taught.split(batch)), list(classes.split(batch)), temperature),
                "patch_loss": self.patch_loss(taught_patches, patches, mask, temperature),
            }

    @torch.no_grad()
    def teach(self, momentum: float) -> None:
        """Move the teacher: momentum · teacher + (1 - momentum) · student."""
        from lightly.models.utils import update_momentum

        update_momentum(self.student, self.teacher, momentum)

    def _normalise(self, crops: Tensor) -> Tensor:
        return (crops - self.mean) / self.std


class _Batches(Dataset):
    """The crops of every step, as pure functions of its number: any process may make any of them."""

    def __init__(self, patches: TissuePatches, config: IbotConfig, image_px: int, seed: int, rank: int, world: int):
        self.patches, self.config, self.seed, self.rank, self.world = patches, config, seed, rank, world
        self.kinds = (
            Crops(2, image_px, config.global_scale),
            Crops(config.local_crops, config.local_px, config.local_scale),
        )

    def __getitem__(self, step: int) -> tuple[int, np.ndarray, list[Tensor]]:
        """Step, this process's positions in the global batch, and its crops (n, b, 3, px, px) of both kinds."""
        rows = batch_rows(self.seed, step, len(self.patches), self.config.batch_size)
        mine = np.array_split(np.arange(len(rows)), self.world)[self.rank]
        if not len(mine):  # see run_loop: take part with a zero loss
            mine = np.array([0])
        # everything random is drawn for the global batch on every process; each then takes its rows
        generator = step_generator(self.seed, 30, step)
        shift = torch.rand(len(rows), 2, generator=generator)[mine] - 0.5
        read = self.patches.read(rows[mine], shift.numpy())
        images = torch.from_numpy(read).permute(0, 3, 1, 2).to(torch.float32) / 255
        crops = []
        for kind in self.kinds:
            places = torch.rand(len(rows), kind.number, CROP_DRAWS, generator=generator)[mine]
            stains = torch.rand(len(rows), kind.number, STAIN_DRAWS, generator=generator)[mine]
            cut = jitter_stains(random_crops(images, kind, places), self.config.stain_jitter, stains)
            crops.append(cut.transpose(0, 1).contiguous())
        return step, mine, crops


def pretrain_histology(
    slides: Sequence[AnnData],
    vit: VitConfig,
    config: IbotConfig,
    folder: str | Path,
    seed: int = 0,
    probe_slides: Sequence[AnnData] = (),
    probe_labels: Sequence[np.ndarray] = (),
    accelerator: Accelerator | None = None,
    continue_with: str = "the same command",
) -> Encoder:
    """Pre-train a histology encoder on the tissue of slides by iBOT.

    Patches are cut from anywhere on the tissue as training goes. Batches, crops and masks are functions of seed and
    step alone: a stopped run continues to the weights of one that was not, on any number of workers. A finished folder
    is loaded and returned.

    Parameters
    ----------
    slides
        Slides with image; only their tissue is looked at.
    vit, config, seed
        What is trained, and how.
    folder
        Gets the teacher's ViT as `load_encoder` reads it (`model.safetensors` and timm's `config.json`); the log and
        the checkpoint lie beside it in `<folder>-training`. The log's `knn_accuracy`, `linear_accuracy` and
        `chance` (that of the known spots' most frequent class) are the probes'.
    probe_slides, probe_labels
        Slides and the classes of their spots (n,) by which it is watched; see `make_probe`. None: it is not.

    Returns
    -------
    Encoder
        The teacher.

    Raises
    ------
    ConfigError
        lightly is not installed, sizes do not fit each other, or the folder holds another run.
    DataError
        No slide shows tissue.
    """
    folder = Path(folder)
    settings = {"vit": vit.model_dump(mode="json"), "training": config.model_dump(mode="json"), "seed": seed}
    if (folder / "config.json").exists():
        made = read_json(folder / "pretraining.json")
        # an earlier version had more settings
        made["training"] = {key: made["training"].get(key) for key in settings["training"]}
        if made != settings:
            raise ConfigError(f"{folder} holds an encoder that was pre-trained otherwise; choose another folder")
        logger.info("%s is finished", folder)
        return load_encoder(str(folder), device="cpu")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is no pre-trained encoder; choose another folder")
    training = folder.with_name(f"{folder.name}-training")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Ibot(vit, config)
    side = model.student.vit.vit.patch_embed.patch_size[0]
    if config.local_crops and config.local_px % side:
        raise ConfigError(f"local_px {config.local_px} must be a multiple of the ViT's patches of {side} px")
    accelerator = accelerator or make_accelerator(config, training)
    # a crop of the middle of its range is neither reduced nor enlarged
    read_px = round(model.image_px / math.sqrt(sum(config.global_scale) / 2))
    patches = TissuePatches(slides, vit.patch_um, read_px)
    logger.info("%d places on the tissue of %d slides", len(patches), len(slides))
    total, per_epoch = config.num_steps(len(patches)), config.steps_per_epoch(len(patches))
    frozen = per_epoch if config.frozen_last_layer_steps is None else config.frozen_last_layer_steps
    dataset = _Batches(patches, config, model.image_px, seed, accelerator.process_index, accelerator.num_processes)
    batches: Iterator | None = None

    def batch_loss(module, step, rows, positions, generator) -> Tensor:
        nonlocal batches
        if batches is None:  # the loop alone knows where it continues
            batches = _load(dataset, step, total, config.workers)
        made, mine, crops = next(batches)
        assert made == step and np.array_equal(mine, positions)
        masks = block_masks(2 * len(rows), model.grid, config.masked_images, config.masked_share, generator)
        mask = masks.unflatten(0, (2, len(rows)))[:, torch.from_numpy(positions)]
        if not mask.any():  # a process with few patches: a loss of nothing has no gradient to share
            mask[0, 0, 0, 0] = True
        large, small, mask = (tensor.to(accelerator.device) for tensor in (*crops, mask))
        losses = module(large, small, mask, config.temperature_at(step))
        return (losses["class_loss"] + model.patch_loss_weight * losses["patch_loss"]) * (len(positions) / len(rows))

    def before_step(step: int) -> None:
        if step < frozen:
            for layer in model.last_layers:
                for parameter in layer.parameters():
                    parameter.grad = None

    probe = None
    if probe_slides and accelerator.is_main_process:
        probe = make_probe(probe_slides, probe_labels, vit.patch_um, model.image_px, config.probe_spots, seed)

    def measure() -> dict[str, float]:
        images = torch.from_numpy(probe.patches).permute(0, 3, 1, 2)
        features = []
        for part in images.split(config.batch_size):
            part = model._normalise(part.to(accelerator.device, torch.float32) / 255)
            with accelerator.autocast():
                features.append(model.teacher.tokens(part)[0].float().cpu())
        return probe.accuracies(torch.cat(features).numpy())

    with lock_folder(training):
        try:
            run_loop(
                model,
                batch_loss,
                len(patches),
                config,
                training,
                seed,
                accelerator=accelerator,
                description="pre-training",
                unit="patches",
                continue_with=continue_with,
                carried=model.carried,
                before_step=before_step,
                after_step=lambda step: model.teach(config.momentum_at(step, total)),
                measure=measure if probe is not None else None,
                weight_decay=lambda step: config.weight_decay_at(step, total),
                max_grad_norm=config.max_grad_norm,
            )
        finally:
            patches.close()
            del batches
        if accelerator.is_main_process:
            save_encoder(model.teacher.vit.vit, vit, folder, settings)
            logger.info("wrote %s (%d steps)", folder, total)
        accelerator.wait_for_everyone()
    return load_encoder(str(folder), device="cpu")


def save_encoder(network: VisionTransformer, vit: VitConfig, folder: str | Path, settings: dict[str, Any]) -> Path:
    """Write a ViT as `load_encoder` and timm read it.

    Parameters
    ----------
    network, vit
        The ViT and what it is.
    folder
        Gets `model.safetensors`, timm's `config.json` and `pretraining.json`.
    settings
        Content of `pretraining.json`.

    Returns
    -------
    Path
        `folder`.
    """
    px = network.patch_embed.img_size[0]
    arguments = {"global_pool": vit.pooling, **vit.arguments} | ({"fc_norm": False} if vit.pooling == "avg" else {})
    description = {
        "architecture": vit.architecture,
        "num_classes": 0,
        "num_features": network.num_features,
        "global_pool": vit.pooling,
        "patch_um": vit.patch_um,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, px, px],
            "mean": list(vit.mean),
            "std": list(vit.std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    dtype = getattr(torch, vit.dtype)
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / "model.safetensors")
        write_json(temporary / "pretraining.json", settings)
        write_json(temporary / "config.json", description)
    return Path(folder)


def _load(dataset: _Batches, step: int, total: int, workers: int) -> Iterator:
    # a loader draws a seed when it starts: not from the global generator, which the loop has set for this step
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=range(step, total),
            num_workers=workers,
            generator=torch.Generator(),
        )
    )
