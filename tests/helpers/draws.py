"""Draws from feature arrays, without a run."""

import numpy as np
import torch

from hinge.diffusion import Draws, SamplingSettings, SlideInputs, draw_spots

OF_INPUTS = ("positions", "observed", "library_size", "slide_effect")


def draw_features(model, scheduler, features, gene_ids, barcodes, slide="s", first_draw=0, **options) -> Draws:
    """Draw spots; they are spatially correlated if positions are given. Options are of SlideInputs and settings."""
    inputs = SlideInputs(
        slide, list(barcodes), np.asarray(features), **{key: options.pop(key, None) for key in OF_INPUTS}
    )
    settings = SamplingSettings(spatially_correlated=inputs.positions is not None, **options)
    return draw_spots(model, scheduler, torch.as_tensor(gene_ids), inputs, settings, first_draw)
