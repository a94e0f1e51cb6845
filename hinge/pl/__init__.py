"""Figures of draws with matplotlib, in the manner of `scanpy.pl`."""

from hinge.pl.maps import gene
from hinge.pl.matrices import coexpression

__all__ = ["coexpression", "gene"]
