"""Names of the baselines; importing this module imports nothing else."""

DEFAULT_BASELINES = ("mean", "ridge-hest", "ridge-cv", "ridge-cv+residual", "knn", "training-correlation")
BASELINES = (*DEFAULT_BASELINES[:-1], "mlp", DEFAULT_BASELINES[-1])
"""Methods of `fit_baselines`, in the order of its result."""

GENERATIVE_BASELINES = ("gaussian-diffusion", "flow-matching")
"""Methods of `hinge.diffusion.gaussian`, which train the run's denoiser by another objective."""
