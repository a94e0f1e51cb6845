"""Batches of iBOT: augmented crops of tissue patches."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hinge.data.tissue_patches import TissuePatches
from hinge.training.augmentation import CROP_DRAWS, STAIN_DRAWS, Crops, jitter_stains, random_crops
from hinge.training.ibot_config import IbotConfig
from hinge.training.loop import batch_rows, step_generator


class CropBatches(Dataset):
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


def load_batches(dataset: CropBatches, step: int, total: int, workers: int) -> Iterator:
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
