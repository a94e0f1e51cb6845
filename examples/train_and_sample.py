"""Train on simulated slides, draw the expression of a held-out slide, and score the draws.

python examples/train_and_sample.py OUTPUT
"""

import json
import sys
from pathlib import Path

import hinge


def main(output: Path) -> None:
    hinge.simulate_slides(output / "slides", n_slides=3, grid=(8, 8), n_genes=40, um_per_px=2.0)
    settings = {
        "output": str(output / "run"),
        "data": {"path": str(output / "slides"), "train": ["sim0", "sim1"], "test": ["sim2"]},
        "transform": "log1p_cp10k",
        "panel": {"genes": 20},
        "features": {"encoder": "stain-texture", "patch_um": 150.0},
        "backbone": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "pretrain": {"steps": 30, "batch_size": 32},
        },
        "training": {"steps": 20, "epochs": None, "batch_size": 32},
    }
    # a YAML file does as well; JSON is YAML
    (output / "run.yaml").write_text(json.dumps(settings))
    run = hinge.train(output / "run.yaml")

    pipe = hinge.HingePipeline.from_pretrained(run.folder)
    slide = hinge.read_slide(output / "slides", "sim2")
    draws = pipe(slide, num_draws=10, seed=0)
    layers = [name for name in draws.layers if name]
    print(f"{draws.n_obs} spots, {draws.n_vars} genes; layers: {', '.join(layers[:4])}, …")

    run.sample("sim2")  # the same draws, as a file of the run
    scores = json.loads(Path(hinge.evaluate(run)).read_text())
    for row in scores["rows"]:
        print(f"{row['method']:22} MSE {row['mse'] or float('nan'):.3f}  CRPS {row['crps'] or float('nan'):.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
