"""Frozen histology encoders and the extraction of their features."""

from hinge.encoders.encoder import Encoder
from hinge.encoders.extract import extract_features
from hinge.encoders.recipes import RECIPES, Recipe
from hinge.encoders.registry import load_encoder

__all__ = ["RECIPES", "Encoder", "Recipe", "extract_features", "load_encoder"]
