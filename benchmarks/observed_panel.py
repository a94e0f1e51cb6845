"""How well the other half of a panel is drawn when one half was measured: PCC per slide, with and without.

    python benchmarks/observed_panel.py runs/loso-log2p1/*/seed0

Every other gene of the panel, in the panel's order, is given as measured on the run's test slides, the rest is scored.
"""

import tempfile
from pathlib import Path
from typing import Annotated

from hinge.utils.threads import prepare_cpu

prepare_cpu()

import numpy as np  # noqa: E402
import typer  # noqa: E402

from hinge.data.draws import read_draws  # noqa: E402
from hinge.evaluation.predictions import prediction_from_draws  # noqa: E402
from hinge.run.run import Run  # noqa: E402


def correlations(values: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """PCC of each gene between values and their prediction, both (n, G)."""
    with np.errstate(invalid="ignore"):
        return np.array([np.corrcoef(values[:, gene], mean[:, gene])[0, 1] for gene in range(values.shape[1])])


def main(runs: Annotated[list[Path], typer.Argument(help="Folders of trained runs.")]) -> None:
    print(f"{'slide':8}{'image alone':>14}{'and half measured':>20}   mean PCC of the other half; genes that gain")
    for folder in runs:
        run = Run.open(folder)
        genes = run.panel().genes
        hidden = np.arange(len(genes)) % 2 == 1
        for name in run.config.data.test:
            slide, spots = run.slide(name), run.spots([name])
            with tempfile.TemporaryDirectory() as temporary:
                measured = slide[:, [gene for gene, left in zip(genes, hidden, strict=True) if not left]].copy()
                measured.obs["total_counts"] = np.asarray(slide.X.sum(axis=1)).ravel()
                measured.write_h5ad(Path(temporary) / "panel.h5ad")
                alone = read_draws(run.sample(name, output=Path(temporary) / "alone.h5ad"))
                given = read_draws(
                    run.sample(name, output=Path(temporary) / "given.h5ad", observed=Path(temporary) / "panel.h5ad")
                )
            means = [prediction_from_draws(draws, spots).mean for draws in (alone, given)]
            before, after = (correlations(spots.values, mean)[hidden] for mean in means)
            gain = np.nanmean(after > before)
            print(f"{name:8}{np.nanmean(before):14.3f}{np.nanmean(after):20.3f}   {gain:.0%}", flush=True)


if __name__ == "__main__":
    typer.run(main)
