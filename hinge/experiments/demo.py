"""The whole chain on simulated tissue: what `hinge demo` runs."""

import logging
from pathlib import Path

from hinge.config import check_config
from hinge.data.simulate import simulate_slides
from hinge.report import report_run
from hinge.run.run import Run
from hinge.utils.locks import lock_folder

logger = logging.getLogger(__name__)

PRETRAIN_FROM = 100  # first number of the slides without image


def run_demo(output: str | Path, seed: int = 0) -> Run:
    """Simulate slides, train on three, sample and score a fourth, write the report.

    Parameters
    ----------
    output
        Folder for `slides/` and `run/`; finished parts of an earlier call are kept.
    seed
        Of the tissue and of everything after it.

    Returns
    -------
    Run
        The finished run.
    """
    with lock_folder(output):
        return _run_demo(Path(output), seed)


def _run_demo(output: Path, seed: int) -> Run:
    slides = output / "slides"
    training, test, pretraining = ["sim0", "sim1", "sim2"], ["sim3"], [f"sim{PRETRAIN_FROM + i}" for i in range(8)]
    if not all((slides / f"{name}.h5ad").exists() for name in [*training, *test]):
        simulate_slides(slides, n_slides=4, grid=(15, 15), seed=seed)
    if not all((slides / f"{name}.h5ad").exists() for name in pretraining):
        simulate_slides(
            slides, n_slides=len(pretraining), grid=(20, 20), seed=seed, with_image=False, first=PRETRAIN_FROM
        )
    config = {
        "output": str(output / "run"),
        "seed": seed,
        "transform": "log1p_cp10k",
        "data": {
            "path": str(slides),
            "format": "h5ad",
            "train": training,
            "test": test,
            "pretrain": pretraining,
        },
        "panel": {"genes": 60},
        "features": {"encoder": "stain-texture", "patch_um": 150.0},
        "backbone": {
            "hidden_size": 64,
            "pretrain": {"steps": 300, "learning_rate": 2e-3, "precision": "bf16", "evaluate_every": 100},
        },
        "model": {"modulation_rank": 4, "feature_dropout": 0.5},
        "diffusion": {"schedule": "cosine"},
        "training": {
            "steps": 150,
            "epochs": None,
            "batch_size": 64,
            "learning_rate": 5e-4,
            "precision": "bf16",
            "ema_decay": 0.99,
            "evaluate_every": 20,
        },
        "sampling": {"draws": 20, "steps": 8, "precision": "bf16"},
    }
    run = Run(check_config(config, "the demo's configuration"))
    run.train()
    for name in test:
        run.sample(name)
    run.evaluate()
    report_run(run)
    return run
