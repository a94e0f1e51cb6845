"""Hold every slide out once, with several seeds, and average the scores.

python benchmarks/leave_one_slide_out.py --config configs/her2st.yaml --slides C2 C3 C4 C5 --seeds 0 1 2 -o runs/loso

A grid of `hinge ablate` with one variant: panel, backbone and model are made again for every held-out slide; seeds of
one slide share panel and backbone. Finished parts are kept: the same command goes on where it stopped.
"""

import argparse
import logging
import sys
from pathlib import Path

from hinge.experiments.ablation import run_grid
from hinge.experiments.grid import Grid
from hinge.experiments.table import markdown, summarise_cells
from hinge.utils.errors import HingeError
from hinge.utils.files import write_json
from hinge.utils.ray_workers import Cluster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--slides", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--ray", nargs="?", const="local", help="address of a Ray cluster; alone: one on this machine")
    parser.add_argument("overrides", nargs="*", help="key=value, as of hinge run")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hinge").setLevel(logging.INFO)
    output = Path(arguments.output)
    slides = ", ".join(arguments.slides)
    # the grid sets the training slides of each held-out slide
    overrides = [*arguments.overrides, f"data.train=[{slides}]", "data.test=[]"]
    grid = Grid(base=arguments.config, held_out=arguments.slides, seeds=arguments.seeds, variants={"runs": {}})
    cluster = None if arguments.ray is None else Cluster(arguments.ray)
    try:
        rows, failures = run_grid(grid, output, overrides, cluster)
    except HingeError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    write_json(output / "scores.json", {"rows": rows})
    # ± the deviation over seeds of the mean over slides
    text = markdown(summarise_cells(rows), "sd_seeds", with_variant=False)
    (output / "scores.md").write_text(text + "\n")
    print(text)
    if failures:
        sys.exit("\n".join(f"{failure.name} failed: {failure.message}" for failure in failures))


if __name__ == "__main__":
    main()
