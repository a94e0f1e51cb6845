"""Names of the baselines, and defaults that several packages share; importing this module imports nothing else."""

LEVELLED = "ridge-cv+residual+level"
DEFAULT_BASELINES = ("mean", "ridge-hest", "ridge-cv", "ridge-cv+residual", LEVELLED, "knn", "training-correlation")
PRETRAINED = "ridge-cv+residual+pretrained"
BASELINES = (*DEFAULT_BASELINES[:-1], PRETRAINED, "mlp", DEFAULT_BASELINES[-1])
"""Methods of `fit_baselines`, in the order of its result."""

GENERATIVE_BASELINES = ("gaussian-diffusion", "flow-matching")
"""Methods of `hinge.diffusion.gaussian`, which train the run's denoiser by another objective."""

DEFAULT_DRAWS = 20
"""Number of draws of a slide."""

DEFAULT_RESAMPLES = 300
"""Number of resamples of the spots for intervals of scores."""
