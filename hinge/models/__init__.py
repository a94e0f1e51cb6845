"""Where the histology and the expression world meet: SoftAdaLN, value heads, HingeModel."""

from hinge.models.heads import HEADS, CensoredGaussianOutput, GaussianOutput, HeadOutput, PointOutput
from hinge.models.hinge import HingeModel

__all__ = ["HEADS", "CensoredGaussianOutput", "GaussianOutput", "HeadOutput", "HingeModel", "PointOutput"]
