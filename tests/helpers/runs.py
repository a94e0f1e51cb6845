"""Settings of a run that is finished in seconds."""

from pathlib import Path


def tiny_settings(slides: Path, output: Path, **changes) -> dict:
    """Return the settings of a small run; a change is named as in `sampling__draws=2`, a section's key after `__`.

    It trains on sim0 and sim1, is tested on sim2, and the backbone is trained on sim10 and sim11: `tiny_slides`.
    """
    content = {
        "output": str(output),
        "data": {"path": str(slides), "train": ["sim0", "sim1"], "test": ["sim2"], "pretrain": ["sim10", "sim11"]},
        "panel": {"genes": 20},
        "features": {"encoder": "stain-texture"},  # the default has a network, too
        "backbone": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "pretrain": {"steps": 6, "batch_size": 16},
        },
        "training": {"epochs": None, "steps": 6, "batch_size": 16},
        "sampling": {"draws": 3, "steps": 4},
    }
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (content[section] if section else content)[name] = value
    return content


def finish(run) -> None:
    """Go through all stages of a run."""
    from hinge.report import report_run

    run.train()
    for name in run.config.data.test:
        run.sample(name)
    run.evaluate()
    report_run(run)
