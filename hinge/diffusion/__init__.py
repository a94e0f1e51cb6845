"""Masked diffusion in expression space: scheduler, objective, sampling."""

from hinge.diffusion.loss import draw_timesteps, loss_mask, spot_weights
from hinge.diffusion.pipeline import Draws, HingePipeline, spot_uniforms
from hinge.diffusion.scheduler import MaskedDiffusionScheduler

__all__ = [
    "Draws",
    "HingePipeline",
    "MaskedDiffusionScheduler",
    "draw_timesteps",
    "loss_mask",
    "spot_uniforms",
    "spot_weights",
]
