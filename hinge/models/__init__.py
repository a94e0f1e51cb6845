"""Where histology and expression meet: the modulated backbone, value heads and their distributions."""

from hinge.utils.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "distributions": (
            "CensoredGaussian",
            "ClampedGaussian",
            "CountGrid",
            "ExpressionDistribution",
            "NegativeBinomial",
            "PointMass",
            "RoundedGaussian",
            "RoundedMixture",
        ),
        "heads": ("HEADS",),
        "hinge": ("HingeModel",),
    },
)
