"""Hold every slide out once, with several seeds, and average the scores.

python scripts/leave_one_slide_out.py --config configs/her2st.yaml --slides C2 C3 C4 C5 --seeds 0 1 2 -o runs/loso

Panel, backbone and model are made anew for every held-out slide; seeds of one slide share panel and backbone.
Finished parts are kept: the same command goes on where it stopped.
"""

import argparse
import multiprocessing
import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

COLUMNS = {
    "pcc_50": "PCC-50",
    "pcc_mean": "mean PCC",
    "mse": "MSE",
    "crps": "CRPS",
    "energy": "energy",
    "variogram": "variogram",
    "coverage_50": "50 % covers",
    "coverage_90": "90 % covers",
    "coexpression_r": "co-expr. r",
    "coexpression_rmse": "RMSE",
    "coexpression_r_pooled": "pooled r",
    "coexpression_rmse_pooled": "RMSE",
    "moran_ratio": "Moran's I ratio",
    "c2st_auc": "C2ST AUC",
}


def one_slide(config: str, overrides: list[str], slides: list[str], held_out: str, seeds: list[int], output: str):
    """Train, sample and score one held-out slide with every seed; the rows of scores."""
    from hinge.config import load_config
    from hinge.files import read_json
    from hinge.run import Run

    rows, backbone = [], None
    for seed in seeds:
        train = ", ".join(slide for slide in slides if slide != held_out)
        folder = Path(output) / held_out / f"seed{seed}"
        settings = [f"data.train=[{train}]", f"data.test=[{held_out}]", f"seed={seed}", f"sampling.seed={seed}"]
        if backbone is not None:
            settings.append(f"backbone.path={backbone}")
        run = Run(load_config(config, [*overrides, *settings, f"output={folder}"]))
        run.train()
        run.sample(held_out)
        backbone = backbone or run.backbone_path
        rows += [{**row, "seed": seed} for row in read_json(run.evaluate())["rows"]]
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: mean over slides and seeds, ± the standard deviation over seeds of the mean over slides."""
    methods = defaultdict(list)
    for row in rows:
        methods[row["method"]].append(row)
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = ["| method | " + " | ".join(COLUMNS[key] for key in keys) + " |", "| --- " * (len(keys) + 1) + "|"]
    for method, own in methods.items():
        cells = []
        for key in keys:
            per_seed = defaultdict(list)
            for row in own:
                if row.get(key) is not None and np.isfinite(row[key]):
                    per_seed[row["seed"]].append(row[key])
            means = [np.mean(values) for values in per_seed.values()]
            spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 and np.std(means) > 5e-4 else ""
            cells.append(f"{np.mean(means):.3f}{spread}" if means else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--slides", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--jobs", type=int, default=1, help="held-out slides at the same time")
    parser.add_argument("overrides", nargs="*", help="key=value, as of hinge run")
    arguments = parser.parse_intermixed_args()
    if arguments.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
        # threads that wait for each other by spinning take the cores from the other jobs
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        tasks = [
            pool.submit(
                one_slide,
                arguments.config,
                arguments.overrides,
                arguments.slides,
                slide,
                arguments.seeds,
                arguments.output,
            )
            for slide in arguments.slides
        ]
        for task in tasks:
            rows += task.result()
    from hinge.files import write_json

    write_json(Path(arguments.output) / "scores.json", {"rows": rows})
    text = table(rows)
    (Path(arguments.output) / "scores.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
