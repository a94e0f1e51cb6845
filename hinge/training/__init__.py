"""Training of everything that is trained: one loop, one file per objective."""

from hinge.utils.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "expression": ("pretrain_expression",),
        "gaussian": ("train_denoiser",),
        "hinge": ("train_hinge",),
        "rows": ("split_spots", "spots_in_memory"),
        "settings": ("PretrainConfig", "TrainingConfig"),
    },
)
