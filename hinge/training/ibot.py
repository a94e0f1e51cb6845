"""Self-supervised pre-training of a histology encoder on H&E patches, by iBOT.

A student ViT sees crops of a patch, the large ones with blocks of tokens masked. A teacher, the moving average of the
student, sees the large crops without masks. The student learns to predict the teacher's output for the class token of
the other large crops (DINO [1]_) and for the masked tokens (iBOT [2]_). Losses, heads, masks and the ViT that takes
masks are lightly's.

.. [1] Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021.
.. [2] Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from anndata import AnnData
from torch import Tensor, nn

from hinge.data.tissue_patches import TissuePatches
from hinge.encoders.encoder import Encoder
from hinge.encoders.registry import load_encoder
from hinge.training.ibot_batches import CropBatches, load_batches
from hinge.training.ibot_config import IbotConfig, VitConfig
from hinge.training.ibot_model import Ibot, block_masks, save_encoder
from hinge.training.loop import make_accelerator, run_loop
from hinge.training.probe import Probe, make_probe
from hinge.utils.errors import ConfigError
from hinge.utils.files import read_json
from hinge.utils.locks import lock_folder, remove_left_lock

logger = logging.getLogger(__name__)


class _BatchLoss:
    """The loss of a batch of crops; a `BatchLoss` of the training loop.

    The batches are loaded from the first step on for which the loss is computed.
    """

    def __init__(self, model: Ibot, config: IbotConfig, dataset: CropBatches, total: int, device: torch.device):
        self.model, self.config, self.dataset, self.total, self.device = model, config, dataset, total, device
        self.batches: Iterator | None = None

    def __call__(
        self, module: nn.Module, step: int, rows: np.ndarray, positions: np.ndarray, generator: torch.Generator
    ) -> Tensor:
        config = self.config
        if self.batches is None:  # only the loop has the step at which it continues
            self.batches = load_batches(self.dataset, step, self.total, config.workers)
        made, mine, crops = next(self.batches)
        assert made == step and np.array_equal(mine, positions)
        masks = block_masks(2 * len(rows), self.model.grid, config.masked_images, config.masked_share, generator)
        mask = masks.unflatten(0, (2, len(rows)))[:, torch.from_numpy(positions)]
        if not mask.any():  # in a process with few patches: without a masked token there is no gradient to share
            mask[0, 0, 0, 0] = True
        large, small, mask = (tensor.to(self.device) for tensor in (*crops, mask))
        losses = module(large, small, mask, config.temperature_at(step))
        loss = losses["class_loss"] + self.model.patch_loss_weight * losses["patch_loss"]
        return loss * (len(positions) / len(rows))

    def close(self) -> None:
        """End the processes that load batches."""
        self.batches = None


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether a folder holds the encoder of these settings.

    Raises
    ------
    ConfigError
        It holds something else.
    """
    if (folder / "config.json").exists():
        made = read_json(folder / "pretraining.json")
        # an earlier version had more settings
        made["training"] = {key: made["training"].get(key) for key in settings["training"]}
        if made != settings:
            raise ConfigError(f"{folder} holds an encoder that was pre-trained otherwise; choose another folder")
        return True
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is no pre-trained encoder; choose another folder")
    return False


def _new_model(vit: VitConfig, config: IbotConfig, seed: int) -> Ibot:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Ibot(vit, config)
    side = model.student.vit.vit.patch_embed.patch_size[0]
    if config.local_crops and config.local_px % side:
        raise ConfigError(f"local_px {config.local_px} must be a multiple of the ViT's patches of {side} px")
    return model


def _accuracies(model: Ibot, probe: Probe, batch_size: int, accelerator: Accelerator) -> dict[str, float]:
    """Return the accuracies of the probe on the teacher's features."""
    images = torch.from_numpy(probe.patches).permute(0, 3, 1, 2)
    features = []
    for part in images.split(batch_size):
        part = model._normalise(part.to(accelerator.device, torch.float32) / 255)
        with accelerator.autocast():
            features.append(model.teacher.tokens(part)[0].float().cpu())
    return probe.accuracies(torch.cat(features).numpy())


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

    Patches are cut at random places on the tissue during training. Batches, crops and masks depend on seed and step
    only: an interrupted run ends with the weights of an uninterrupted one, for any number of workers. The encoder in a
    finished folder is returned.

    Parameters
    ----------
    slides
        Slides with image; only their tissue is used.
    vit, config, seed
        Architecture, training settings and seed.
    folder
        Folder of the teacher's ViT for `load_encoder` (`model.safetensors` and timm's `config.json`); log and
        checkpoint are beside it in `<folder>-training`. `knn_accuracy`, `linear_accuracy` and `chance` (the share of
        the most frequent class) in the log are those of the probe.
    probe_slides, probe_labels
        Slides and the classes (n,) of their spots for the probe, see `make_probe`; empty: no probe.

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
    settings: dict[str, Any] = {
        "vit": vit.model_dump(mode="json"),
        "training": config.model_dump(mode="json"),
        "seed": seed,
    }
    training = folder.with_name(f"{folder.name}-training")
    if _is_finished(folder, settings):
        remove_left_lock(training)
        logger.info("%s is finished", folder)
        return load_encoder(str(folder), device="cpu")
    model = _new_model(vit, config, seed)
    accelerator = accelerator or make_accelerator(config, training)
    # a crop of the middle of its range is neither reduced nor enlarged
    read_px = round(model.image_px / math.sqrt(sum(config.global_scale) / 2))
    patches = TissuePatches(slides, vit.patch_um, read_px)
    logger.info("%d places on the tissue of %d slides", len(patches), len(slides))
    total, per_epoch = config.num_steps(len(patches)), config.steps_per_epoch(len(patches))
    frozen = per_epoch if config.frozen_last_layer_steps is None else config.frozen_last_layer_steps
    dataset = CropBatches(patches, config, model.image_px, seed, accelerator.process_index, accelerator.num_processes)
    batch_loss = _BatchLoss(model, config, dataset, total, accelerator.device)

    def before_step(step: int) -> None:
        if step < frozen:
            for layer in model.last_layers:
                for parameter in layer.parameters():
                    parameter.grad = None

    probe = None
    if probe_slides and accelerator.is_main_process:
        probe = make_probe(probe_slides, probe_labels, vit.patch_um, model.image_px, config.probe_spots, seed)

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
                measure=None if probe is None else partial(_accuracies, model, probe, config.batch_size, accelerator),
                weight_decay=lambda step: config.weight_decay_at(step, total),
                max_grad_norm=config.max_grad_norm,
            )
        finally:
            patches.close()
            batch_loss.close()
        if accelerator.is_main_process:
            save_encoder(model.teacher.vit.vit, vit, folder, settings)
            logger.info("wrote %s (%d steps)", folder, total)
        accelerator.wait_for_everyone()
    return load_encoder(str(folder), device="cpu")
