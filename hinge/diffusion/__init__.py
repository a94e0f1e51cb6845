"""Masked diffusion in expression space: scheduler, objective, sampling."""

from hinge.utils.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "inputs": ("SamplingSettings", "SlideInputs"),
        "loss": ("draw_timesteps", "loss_mask", "spot_weights"),
        "pipeline": ("HingePipeline",),
        "sampler": ("Draws", "draw_spots"),
        "scheduler": ("MaskedDiffusionScheduler",),
    },
)
