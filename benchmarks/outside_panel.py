"""Draws of genes that no training slide measured, beside linear predictions of them.

    python benchmarks/outside_panel.py --config configs/her2st.yaml --slide C5 --slide B4 -o runs/outside
    python benchmarks/outside_panel.py --config configs/her2st.yaml --slide C5 --slide B4 -o runs/outside-random \\
        backbone.weights=random

A run trains on the genes of its panel with the backbone `backbone.path`, by default the packaged one. The next genes in
the ranking of the training slides that the backbone knows are drawn and scored. Beside them: ridge regression to the
panel, without and with the level of the slide that hinge drew, followed by the conditional mean and covariance of the
further genes given the panel, by Ledoit and Wolf from the counts of `data.pretrain`.
"""

import json
from pathlib import Path
from typing import Annotated

from hinge.utils.threads import prepare_cpu

prepare_cpu()

import numpy as np  # noqa: E402
import typer  # noqa: E402
from anndata import AnnData  # noqa: E402
from sklearn.covariance import LedoitWolf  # noqa: E402

from hinge.config import load_config  # noqa: E402
from hinge.data.count_table import panel_counts, read_counts  # noqa: E402
from hinge.data.panel import select_panel  # noqa: E402
from hinge.data.spots import spot_groups  # noqa: E402
from hinge.data.transforms import get_transform  # noqa: E402
from hinge.diffusion.pipeline import HingePipeline  # noqa: E402
from hinge.evaluation.metrics.accuracy import gene_pcc  # noqa: E402
from hinge.evaluation.metrics.calibration import crps_of_spots  # noqa: E402
from hinge.evaluation.ridge import fit_ridge  # noqa: E402
from hinge.run.run import Run  # noqa: E402

PACKAGED = Path(__file__).parents[1] / "hinge" / "backbones" / "hinge-cellfm-mini"


class Linear:
    """Ridge regression to the panel, and the Gaussian relation of further genes to it."""

    def __init__(self, run: Run, panel: list[str], further: list[str]) -> None:
        counts = read_counts(
            (run.slide(name, require_image=False) for name in run.config.data.pretrain), [*panel, *further], run.patient
        )
        values = counts.values(run.config.transform)
        relation = LedoitWolf().fit(values[np.isfinite(values).all(axis=1)])
        known = len(panel)
        covariance = relation.covariance_
        self.mean, self.known = relation.location_, known
        self.slope = np.linalg.solve(covariance[:known, :known], covariance[:known, known:]).T
        self.rest = covariance[known:, known:] - self.slope @ covariance[:known, known:]
        spots = run.spots(run.config.data.train)
        groups = spot_groups(spots.slide, spots.coords, "fold")
        self.ridge = fit_ridge(spots.features[:, 0], spots.values, groups)
        self.residual = LedoitWolf().fit(spots.values - self.ridge.held_out).covariance_

    def further(self, panel_values: np.ndarray) -> np.ndarray:
        """Conditional mean of the further genes (…, G') given those of the panel (…, G)."""
        return self.mean[self.known :] + (panel_values - self.mean[: self.known]) @ self.slope.T

    def noise(self, draws: int, spots: int) -> np.ndarray:
        """Draws (K, n, G') of what the regression and the relation leave."""
        rng, shape = np.random.default_rng(0), (draws, spots)
        of_panel = rng.multivariate_normal(np.zeros(self.known), self.residual, shape, method="eigh")
        return of_panel @ self.slope.T + rng.multivariate_normal(
            np.zeros(len(self.rest)), self.rest, shape, method="eigh"
        )


def predictions(linear: Linear, features: np.ndarray, level: np.ndarray, draws: int) -> dict[str, tuple]:
    """Expected values (n, G') and draws (K, n, G') of the linear methods.

    `level` (G, 1 + K) is hinge's: the expected level of the slide, and that of each draw.
    """
    image = linear.ridge.predict(features)
    noise = linear.noise(draws, len(image))
    pattern = image - image.mean(axis=0)
    levels = [linear.further(np.maximum(pattern + each, 0)) for each in level.T]
    alone = linear.further(image)
    drawn = np.stack([levels[1 + number] + noise[number] for number in range(draws)])
    return {
        "ridge, Ledoit–Wolf": (alone, np.maximum(alone + noise, 0)),
        "ridge with hinge's level, Ledoit–Wolf": (levels[0], np.maximum(drawn, 0)),
    }


def scores(values: np.ndarray, expected: np.ndarray, draws: np.ndarray) -> dict[str, float]:
    return {
        "pcc_mean": float(np.nanmean(gene_pcc(values, expected))),
        "mse": float(((values - expected) ** 2).mean()),
        "crps": float(crps_of_spots(values, draws).mean()),
    }


def score_slide(
    run: Run, pipe: HingePipeline, linear: Linear, name: str, further: list[str], draws: int
) -> dict[str, dict[str, float]]:
    slide, spots = run.slide(name), run.spots([name])
    slide.uns.setdefault("hinge", {})["patient"] = run.patient(slide)
    rows = slide.obs_names.get_indexer(spots.barcodes)
    values = get_transform(run.config.transform).forward(*panel_counts(slide, further))[rows]
    drawn: AnnData = pipe(slide, num_draws=draws, genes=further, features=run.features(slide), progress=False)
    known = len(pipe.genes)
    layers = np.stack([np.asarray(drawn.layers[f"draw_{number:03d}"])[rows][:, known:] for number in range(draws)])
    methods = {"hinge": (np.asarray(drawn.layers["expected"])[rows][:, known:], layers)}
    level = np.asarray(drawn.varm["slide_level"])[:known]
    methods |= predictions(linear, spots.features[:, 0], level, draws)
    return {method: scores(values, *of_method) for method, of_method in methods.items()}


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as of hinge run.")] = None,
    config: Annotated[Path, typer.Option(help="YAML file of a run.")] = Path("configs/her2st.yaml"),
    slide: Annotated[list[str] | None, typer.Option(help="Slides to score; default: data.test.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path("runs/outside"),
    genes: Annotated[int, typer.Option(help="Further genes.")] = 100,
    draws: Annotated[int, typer.Option(help="Draws of a slide.")] = 20,
) -> None:
    """Train, draw and score; write OUTPUT/outside.json."""
    settings = [*(overrides or []), f"output={output}"]
    transform = load_config(config, settings).transform
    if not any(each.startswith("backbone.path=") for each in settings):
        settings.append(f"backbone.path={PACKAGED / transform}")
    run = Run(load_config(config, settings))
    run.train()
    pipe = HingePipeline.from_pretrained(output)
    known = set(pipe.model.backbone.config.gene_names) - set(pipe.genes)
    training = [run.slide(name) for name in run.config.data.train]
    ranking = select_panel(training, "hmhvg", 2 * (len(pipe.genes) + genes)).genes
    further = [gene for gene in ranking if gene in known][:genes]
    linear = Linear(run, pipe.genes, further)
    found = {}
    for name in slide or run.config.data.test:
        found[name] = score_slide(run, pipe, linear, name, further, draws)
        for method, of_method in found[name].items():
            print(transform, name, method, {key: round(value, 3) for key, value in of_method.items()}, flush=True)
    content = {"transform": transform, "panel": len(pipe.genes), "further": further, "scores": found}
    (output / "outside.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
