"""Fine-tune an encoder with a linear head to predict genes, and score it on held-out slides.

The head and the settings are those of SpaFoundation (Zhang et al. 2025): LayerNorm and one linear layer on the features
of the encoder, mean squared error on log-normalised counts, Adam, all flips and quarter turns of a patch, whole slides
or patients held out.

    config.json            the settings
    scores.json            a row for each held-out slide
    predictions/           of each held-out slide, h5ad for `hinge evaluate --predictions`
    features/              of the encoder before it is tuned, one HDF5 file per slide
    folds/<name>/          panel.json, model.json, head.safetensors; encoder/ if it was tuned; training/
"""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from pydantic import Field, ValidationError
from torch import Tensor, nn

from hinge.config import explain
from hinge.data.features import read_features
from hinge.data.panel import Panel, select_panel
from hinge.data.spots import SpotTable, concatenate_spots, load_spots, spot_groups
from hinge.encoders import Encoder, extract_features, load_encoder
from hinge.encoders.encoder import Joined
from hinge.evaluation.metrics.accuracy import gene_pcc
from hinge.evaluation.ridge import fit_ridge
from hinge.models.options import DEFAULT_TRANSFORM
from hinge.tasks.embeddings import read_slides
from hinge.tasks.folds import Fold, make_folds, slide_groups
from hinge.tasks.patch_store import VIEWS, cut_patches, patch_inputs
from hinge.tasks.regressor import GeneRegressor, predict_slide, save_regressor, start_head
from hinge.training.loop import LoopConfig, make_accelerator, run_loop
from hinge.utils import checksums
from hinge.utils.errors import ConfigError
from hinge.utils.files import atomic_path, read_json, write_json
from hinge.utils.locks import lock_folder
from hinge.utils.packages import require
from hinge.utils.parallel import require_all, task_runner
from hinge.utils.ray_workers import Cluster

logger = logging.getLogger(__name__)

DEFINITIONS = {
    "pcc_median": "median over genes of the Pearson correlation over spots",
    "pcc_mean": "mean over genes of the same; a gene that is constant in the measured slide is left out of both",
    "mse": "mean squared error over spots and genes, in units of the transform",
}

LEARNING_RATES = {"all": 1e-5, "lora": 2e-4, "linear": 1e-4}
"""Default learning rate of each way of tuning; `all` as published."""

ADAPTED = ("qkv", "attn.proj", "fc1", "fc2")
"""Ends of the timm names of the linear layers that get low-rank adapters."""


class FinetuneConfig(LoopConfig):
    """Settings of the training of an encoder and its head."""

    tune: Literal["all", "lora", "linear"] = Field("all", description="all weights, adapters (lora) or the head only")
    start: Literal["ridge", "random"] = Field("ridge", description="the head: solved on frozen features, or random")
    lora_rank: int = Field(8, ge=1)
    epochs: int | None = Field(20, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(LEARNING_RATES["all"], gt=0)
    schedule: Literal["constant", "cosine", "step"] = "constant"


def finetune_config(**settings: Any) -> FinetuneConfig:
    """Return a checked `FinetuneConfig`; the default learning rate depends on `tune`.

    Raises
    ------
    ConfigError
        A setting is unknown or invalid.
    """
    if settings.get("learning_rate") is None:
        settings["learning_rate"] = LEARNING_RATES.get(settings.get("tune", "all"), LEARNING_RATES["all"])
    try:
        return FinetuneConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"fine-tuning cannot start: {explain(error, FinetuneConfig)}") from error


class _Task:
    """What all slides and folds share: the arguments of `finetune_encoder`, the slides, the encoder and the device."""

    def __init__(
        self,
        data: Path,
        samples: list[str] | None,
        encoder: str,
        output: Path,
        config: FinetuneConfig,
        folds: str,
        hold_out: list[str] | None,
        panel: Panel | None,
        n_genes: int,
        transform: str,
        patch_um: float | None,
        seed: int,
    ):
        self.data, self.encoder, self.output, self.config = data, encoder, output, config
        self.panel, self.n_genes, self.transform, self.seed = panel, n_genes, transform, seed
        self.accelerator = make_accelerator(config, output)
        self.start = load_encoder(encoder, device=self.accelerator.device)
        _check_tunable(self.start, config.tune)
        self.patch_um = self.start.patch_um if patch_um is None else patch_um
        self.slides = read_slides(data, samples)
        self.groups = slide_groups(self.slides, folds)
        self.folds = {fold.name: fold for fold in make_folds(self.groups, hold_out)}

    def settings(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        return {
            "encoder": self.encoder,
            "digest": self.start.digest,
            "panel": None if self.panel is None else self.panel.genes,
            "n_genes": self.n_genes,
            "transform": self.transform,
            "patch_um": self.patch_um,
            "seed": self.seed,
            "training": self.config.model_dump(mode="json"),
            "groups": self.groups,
        }

    def extract(self, name: str) -> None:
        """Write the features of a slide, of the encoder before it is tuned."""
        # the head alone is trained on the features of all views
        views = VIEWS if self.config.tune == "linear" else 1
        path = features_of(self.output, name)
        extract_features(self.slides[name], self.start, path, views=views, patch_um=self.patch_um)

    def tune(self, name: str) -> None:
        """Train and score a fold, unless that is done."""
        if not self.scores_of(name).exists():
            # each fold starts from the original weights
            again = self.config.tune != "linear"
            fresh = load_encoder(self.encoder, device=self.accelerator.device) if again else self.start
            _run_fold(self.folds[name], fresh, self)
        self.accelerator.wait_for_everyone()

    def scores_of(self, name: str) -> Path:
        """Return the file of the scores of a fold."""
        return self.output / "folds" / name / "scores.json"


def finetune_encoder(
    data: Path,
    samples: list[str] | None,
    encoder: str,
    output: Path,
    config: FinetuneConfig,
    *,
    folds: str = "slide",
    hold_out: list[str] | None = None,
    panel: Panel | None = None,
    n_genes: int = 200,
    transform: str = DEFAULT_TRANSFORM,
    patch_um: float | None = None,
    seed: int = 0,
    cluster: Cluster | None = None,
) -> Path:
    """Train an encoder and a head on all folds; predict and score the held-out slides.

    Finished folds are kept, and an interrupted one continues from its checkpoint.

    Parameters
    ----------
    data, samples
        Data set, and names of its slides; None for all.
    encoder
        Name for `load_encoder`, a published checkpoint such as `spafoundation@FILE` included.
    output
        Folder for all results.
    config
        Settings of the training.
    folds, hold_out
        See `slide_groups` and `make_folds`.
    panel
        Genes; None to select them in each fold on its training slides.
    n_genes
        Number of genes that are selected without a panel.
    transform
        Units of the values.
    patch_um
        Side of a patch in µm; None for the encoder's.
    seed
        Seed of the head, the order of patches and their views.
    cluster
        Where slides and folds are processed; None: in this process, one after the other.

    Returns
    -------
    Path
        `scores.json`: for each held-out slide, the median and the mean over genes of the Pearson correlation over
        spots, and the mean squared error, beside the mean of the training spots and ridge regression on the features
        of the encoder before it is tuned. Rows of slide `mean` are means over slides.
    """
    given = (data, samples, encoder, output, config, folds, hold_out, panel, n_genes, transform, patch_um, seed)
    task = _Task(*given)
    accelerator = task.accelerator
    with lock_folder(output):
        with accelerator.main_process_first():
            _claim(output, task.settings(), accelerator.is_main_process)
            if cluster is None:
                for name in task.slides:
                    task.extract(name)
        if cluster is None:
            for name in task.folds:
                task.tune(name)
        else:
            with task_runner(cluster) as run:
                require_all(run("slides", {name: name for name in task.slides}, partial(_open_slides, given)), "slides")
                require_all(run("folds", {name: name for name in task.folds}, partial(_open_folds, given)), "folds")
        rows = [row for name in task.folds for row in read_json(task.scores_of(name))["rows"]]
        path = output / "scores.json"
        if accelerator.is_main_process:
            if len({row["slide"] for row in rows}) > 1:
                rows += _means(rows)
            write_json(path, {"encoder": encoder, "transform": transform, "definitions": DEFINITIONS, "rows": rows})
            shutil.rmtree(output / "patches", ignore_errors=True)
        accelerator.wait_for_everyone()
        return path


def _open_slides(given: tuple[Any, ...]) -> Callable[[str], None]:
    return _Task(*given).extract


def _open_folds(given: tuple[Any, ...]) -> Callable[[str], None]:
    return _Task(*given).tune


# --- one fold ----------------------------------------------------------------------------------------


def _run_fold(fold: Fold, encoder: Encoder, task: _Task) -> None:
    """Train on the slides of a fold, then predict and score the held-out ones; tuning changes `encoder`."""
    config, device = task.config, task.accelerator.device
    folder = task.output / "folds" / fold.name
    panel = task.panel or select_panel([task.slides[name] for name in fold.train], n_genes=task.n_genes)
    tables = {name: load_spots(task.slides[name], panel, task.transform) for name in fold.train}
    spots = concatenate_spots(list(tables.values()))
    views = np.concatenate([_frozen(task, encoder, name, table.barcodes) for name, table in tables.items()])
    groups = spot_groups(spots.slide, spots.coords, "fold")
    ridge = fit_ridge(views[:, 0], spots.values, groups)
    model = _seeded(task.seed, lambda: GeneRegressor(encoder, len(panel.genes)))
    if config.start == "ridge":
        start_head(model, views[:, 0], spots.values, groups)
    inputs = _training_inputs(model, encoder, tables, views, task)
    target = torch.from_numpy(spots.values)

    def batch_loss(module, step, rows, positions, generator) -> Tensor:
        turns = torch.randint(VIEWS, (len(rows),), generator=generator).numpy()
        predicted = module(inputs(rows[positions], turns[positions]).to(device))
        error = (predicted.float() - target[rows[positions]].to(device)) ** 2
        return error.sum() / (len(rows) * target.shape[1])

    run_loop(
        model,
        batch_loss,
        len(spots),
        config,
        folder / "training",
        task.seed,
        accelerator=task.accelerator,
        description=f"fold {fold.name}",
    )
    if config.tune == "lora":
        model.encoder = model.encoder.merge_and_unload()
    if task.accelerator.is_main_process:
        baselines = {
            "ridge on frozen features": lambda features: ridge.predict(features),
            "mean of training spots": lambda features: np.tile(spots.values.mean(axis=0), (len(features), 1)),
        }
        rows = _score_fold(fold, model, encoder, panel, baselines, task)
        folder.mkdir(parents=True, exist_ok=True)
        checksums.start(folder, "finetune-encoder")
        panel.save(folder / "panel.json")
        save_regressor(model, encoder, folder, _about(fold, panel, task))
        write_json(folder / "scores.json", {"rows": rows})
        logger.info("fold %s: %s", fold.name, folder)


def _score_fold(
    fold: Fold,
    model: GeneRegressor,
    encoder: Encoder,
    panel: Panel,
    baselines: dict[str, Callable[[np.ndarray], np.ndarray]],
    task: _Task,
) -> list[dict[str, Any]]:
    """Write the predictions of the held-out slides; return their scores beside the baselines."""
    rows = []
    for name in fold.test:
        slide = task.slides[name]
        if task.config.tune == "linear":
            features = _frozen(task, encoder, name, slide.obs_names)[:, 0]
            with torch.inference_mode():
                values = model(torch.from_numpy(features).to(task.accelerator.device)).cpu().numpy()
        else:
            values = predict_slide(model, slide, encoder, task.patch_um)
        _write_prediction(task.output / "predictions" / f"{name}.h5ad", values, slide, panel.genes, task.transform)
        truth = load_spots(slide, panel, task.transform)
        features = _frozen(task, encoder, name, truth.barcodes)[:, 0]
        predictions: dict[str, np.ndarray] = {task.config.tune: values[slide.obs_names.get_indexer(truth.barcodes)]}
        predictions |= {method: predict(features) for method, predict in baselines.items()}
        for method, predicted in predictions.items():
            rows.append({"slide": name, "fold": fold.name, "method": method, **_scores(truth.values, predicted)})
    return rows


def _about(fold: Fold, panel: Panel, task: _Task) -> dict[str, Any]:
    """Return the content of `model.json` without the name of the encoder."""
    sizes = {
        key: float(np.median([task.slides[name].uns["hinge"][key] for name in fold.train]))
        for key in ("spot_pitch_um", "spot_diameter_um")
    }
    return {
        "tune": task.config.tune,
        "patch_um": task.patch_um,
        "genes": panel.genes,
        "transform": task.transform,
        "train": list(fold.train),
        "test": list(fold.test),
        "data": str(task.data.resolve()),
        **sizes,
    }


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean over slides of the scores of each method."""
    table = pd.DataFrame(rows)
    means = table.groupby("method", sort=False)[["pcc_median", "pcc_mean", "mse"]].mean()
    sizes = {"n_spots": int(table.drop_duplicates("slide")["n_spots"].sum()), "n_genes": rows[0]["n_genes"]}
    start = {"slide": "mean", "fold": ""}
    return [{**start, "method": method, **scores, **sizes} for method, scores in means.to_dict("index").items()]


def _scores(measured: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    pcc = gene_pcc(measured, predicted)
    return {
        "pcc_median": float(np.nanmedian(pcc)),
        "pcc_mean": float(np.nanmean(pcc)),
        "mse": float(np.mean((predicted - measured) ** 2)),
        "n_spots": len(measured),
        "n_genes": measured.shape[1],
    }


# --- inputs ------------------------------------------------------------------------------------------


def features_of(output: Path, slide: str) -> Path:
    """Return the feature file of a slide, of the encoder before it is tuned."""
    return output / "features" / f"{slide}.h5"


def _frozen(task: _Task, encoder: Encoder, slide: str, barcodes: np.ndarray) -> np.ndarray:
    """Return the features (n, views, d) of some spots, of the encoder before it is tuned."""
    return read_features(features_of(task.output, slide), barcodes=list(barcodes), digest=encoder.digest).features


def _training_inputs(
    model: GeneRegressor, encoder: Encoder, tables: dict[str, SpotTable], views: np.ndarray, task: _Task
) -> Callable[[np.ndarray, np.ndarray], Tensor]:
    """Return a function of spots and views that gives the model's inputs; make the tuned weights trainable."""
    if task.config.tune == "linear":
        return lambda rows, turns: torch.from_numpy(views[rows, turns])
    with task.accelerator.main_process_first():
        folder = task.output / "patches"
        patches = [
            cut_patches(task.slides[name], encoder, task.patch_um, folder / f"{name}.npy", table.barcodes)
            for name, table in tables.items()
        ]
    if task.config.tune == "lora":
        model.encoder = _seeded(task.seed, lambda: _with_adapters(model.encoder, task.config.lora_rank))
    else:
        model.encoder.requires_grad_(True)
    return patch_inputs(patches)


# --- model -------------------------------------------------------------------------------------------


def _seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Return a module whose random weights are decided by a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _check_tunable(encoder: Encoder, tune: str) -> None:
    if tune == "linear":
        return
    if isinstance(encoder.module, Joined):
        raise ConfigError(f"encoder {encoder.name} is joined of several and supports --tune linear only")
    if not any(True for _ in encoder.module.parameters()):
        raise ConfigError(f"encoder {encoder.name} has no weights and supports --tune linear only")
    if tune == "lora":
        names = [name for name, part in encoder.module.named_modules() if isinstance(part, nn.Linear)]
        if not any(name.endswith(f".{end}") for name in names for end in ADAPTED):
            raise ConfigError(
                f"encoder {encoder.name} has no layers named {', '.join(ADAPTED)} for adapters; "
                "use --tune all or linear"
            )


def _with_adapters(module: nn.Module, rank: int) -> nn.Module:
    require("peft", "lora", "fine-tuning by low-rank adapters")
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(ADAPTED), bias="none")
    return get_peft_model(module, settings)


# --- output ------------------------------------------------------------------------------------------


def _write_prediction(path: Path, values: np.ndarray, slide: AnnData, genes: list[str], transform: str) -> None:
    result = AnnData(X=values)
    result.obs_names, result.var_names = slide.obs_names, genes
    result.obsm["spatial"] = slide.obsm["spatial"]
    result.uns["hinge"] = {**slide.uns["hinge"], "transform": transform}
    with atomic_path(path) as temporary:
        result.write_h5ad(temporary, compression="gzip")


def _claim(output: Path, wanted: dict[str, Any], main: bool) -> None:
    path = output / "config.json"
    if path.exists():
        there = read_json(path)
        differing = [key for key, value in wanted.items() if there.get(key) != value]
        if differing:
            raise ConfigError(f"{output} was made with another {differing[0]}; choose another folder with --output")
    elif main:
        write_json(path, wanted)
