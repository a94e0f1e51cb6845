"""Gene prediction end to end: an encoder and a linear head, trained on spots and scored on slides they never saw.

The head and recipe are SpaFoundation's (Zhang et al. 2025): LayerNorm and one linear layer on the encoder's vector,
mean squared error on log-normalised counts, Adam, all flips and quarter turns of a patch, whole slides or patients
held out.

    config.json            what was asked for
    scores.json            a row for each held-out slide
    predictions/           of each held-out slide, h5ad that `hinge evaluate --predictions` reads
    features/              of the frozen encoder, one HDF5 file a slide
    folds/<name>/          panel.json, model.json, head.safetensors; encoder/, where it was tuned; training/
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import timm
import torch
from accelerate import Accelerator
from anndata import AnnData
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from hinge.config import explain
from hinge.data.features import read_features
from hinge.data.panel import Panel, select_panel
from hinge.data.patches import PatchReader
from hinge.data.slide import slide_name
from hinge.data.spots import concatenate_spots, load_spots
from hinge.encoders import RECIPES, Encoder, extract_features, load_encoder
from hinge.encoders.encoder import Joined, Preprocess
from hinge.encoders.networks import PooledTokens
from hinge.evaluation.baselines import spot_groups
from hinge.evaluation.metrics.accuracy import gene_pcc
from hinge.tasks.embeddings import fit_ridge, read_slides
from hinge.training.loop import LoopConfig, make_accelerator, run_loop
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path, read_json, write_json
from hinge.utils.locks import lock_folder
from hinge.utils.packages import require

logger = logging.getLogger(__name__)

LEARNING_RATES = {"all": 1e-5, "lora": 2e-4, "linear": 1e-4}
"""Of each way of tuning; the first is the paper's."""

ADAPTED = ("qkv", "attn.proj", "fc1", "fc2")
"""Linear layers of a ViT that get low-rank adapters, by the end of their names in timm."""

_VIEWS = 8


class FinetuneConfig(LoopConfig):
    """How an encoder and its head are trained."""

    tune: Literal["all", "lora", "linear"] = Field("all", description="all weights, adapters (lora) or the head only")
    start: Literal["ridge", "random"] = Field("ridge", description="the head: solved on frozen features, or random")
    lora_rank: int = Field(8, ge=1)
    epochs: int | None = Field(20, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(LEARNING_RATES["all"], gt=0)
    schedule: Literal["constant", "cosine", "step"] = "constant"


def finetune_config(**settings: Any) -> FinetuneConfig:
    """A checked `FinetuneConfig`; without a learning rate, that of the way of tuning.

    Raises
    ------
    ConfigError
        A setting is none.
    """
    if settings.get("learning_rate") is None:
        settings["learning_rate"] = LEARNING_RATES.get(settings.get("tune", "all"), LEARNING_RATES["all"])
    try:
        return FinetuneConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"fine-tuning cannot start: {explain(error, FinetuneConfig)}") from error


class GeneRegressor(nn.Module):
    """LayerNorm and a linear layer on an encoder's vector.

    Parameters
    ----------
    encoder
        As `load_encoder` gives it.
    num_genes
        G.
    """

    def __init__(self, encoder: Encoder, num_genes: int):
        super().__init__()
        self.transform, self.encoder = encoder.transform, encoder.module
        self.norm = nn.LayerNorm(encoder.dim)
        self.linear = nn.Linear(encoder.dim, num_genes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Patches, uint8 (B, H, W, 3), or their features, float (B, d), to values (B, G)."""
        features = self.encoder(self.transform(inputs)) if inputs.dtype == torch.uint8 else inputs
        return self.linear(self.norm(features.float()))

    def head(self) -> dict[str, Tensor]:
        """Tensors of the head by name."""
        return {name: t for name, t in self.state_dict().items() if name.split(".")[0] in ("norm", "linear")}


@dataclass(frozen=True)
class Fold:
    """Slides that train and slides that are scored."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def make_folds(groups: Mapping[str, str], hold_out: list[str] | None = None) -> list[Fold]:
    """One fold for each group of slides, which is held out as a whole.

    Parameters
    ----------
    groups
        Group of each slide.
    hold_out
        Only the folds of these groups.

    Raises
    ------
    ConfigError
        There is only one group, or `hold_out` names one that is not there.
    """
    names = sorted(set(groups.values()))
    if len(names) < 2:
        raise ConfigError(f"nothing is left to train on: all slides ({', '.join(groups)}) are of one group, {names[0]}")
    unknown = [name for name in hold_out or [] if name not in names]
    if unknown:
        raise ConfigError(f"there is no group {unknown[0]!r} to hold out; choose from {', '.join(names)}")
    sides = {name: [slide for slide, group in groups.items() if group == name] for name in names}
    return [
        Fold(name, tuple(slide for slide in groups if slide not in sides[name]), tuple(sides[name]))
        for name in names
        if not hold_out or name in hold_out
    ]


def slide_groups(slides: Mapping[str, AnnData], folds: str) -> dict[str, str]:
    """Group of each slide: itself, its patient, or what a table says.

    Parameters
    ----------
    slides
        By name.
    folds
        `slide`; `patient`, from obs["patient"], or the letter that HER2ST's sections begin with; or a CSV or TSV file
        with slides in its first column and their groups in the second.
    """
    if folds == "slide":
        return {name: name for name in slides}
    if folds == "patient":
        return {name: _patient(name, slide) for name, slide in slides.items()}
    path = Path(folds)
    if path.suffix not in (".csv", ".tsv"):
        raise ConfigError(f"folds are by slide, by patient, or as a .csv or .tsv file says, not {folds!r}")
    try:
        table = pd.read_csv(path, sep="," if path.suffix == ".csv" else "\t", index_col=0, dtype=str)
        groups = table.iloc[:, 0].to_dict()
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{path} is not a table of slides and their groups: {error}") from error
    missing = [name for name in slides if not isinstance(groups.get(name), str)]
    if missing:
        raise DataError(f"{path} does not say which group slide {missing[0]} is of")
    return {name: groups[name] for name in slides}


def _patient(name: str, slide: AnnData) -> str:
    if "patient" in slide.obs:
        patients = slide.obs["patient"].astype(str).unique()
        if len(patients) > 1:
            raise DataError(f"slide {name} has spots of {len(patients)} patients, and folds need one a slide")
        return str(patients[0])
    if slide.uns["hinge"]["source_format"] == "her2st":
        return name[0]
    raise DataError(
        f"slide {name} does not tell its patient in obs['patient']: give --folds a table of slides and patients"
    )


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
    transform: str = "log1p_cp10k",
    patch_um: float | None = None,
    seed: int = 0,
) -> Path:
    """Train an encoder and a head on all folds; predict and score the slides held out.

    Finished folds are kept, a stopped one goes on where it stopped.

    Parameters
    ----------
    data, samples
        Data set, and which of its slides (None: all).
    encoder
        As `load_encoder` takes it, a published checkpoint such as `spafoundation@FILE` included.
    output
        Folder for everything.
    config
        How to train.
    folds, hold_out
        See `slide_groups` and `make_folds`.
    panel
        Genes; None: chosen in each fold from its training slides.
    n_genes
        How many are chosen then.
    transform
        Units of the values.
    patch_um
        Side of a patch in µm; None: the encoder's.
    seed
        Of the head, the order of patches and their turns.

    Returns
    -------
    Path
        `scores.json`: of each held-out slide the median and the mean over genes of the Pearson correlation over
        spots, and the mean squared error; beside it the training spots' mean and ridge on the frozen features. Rows
        of slide `mean` are means over slides.
    """
    accelerator = make_accelerator(config, output)
    start = load_encoder(encoder, device=accelerator.device)
    _check_tunable(start, config.tune)
    side = start.patch_um if patch_um is None else patch_um
    asked = {
        "encoder": encoder,
        "digest": start.digest,
        "panel": None if panel is None else panel.genes,
        "n_genes": n_genes,
        "transform": transform,
        "patch_um": side,
        "seed": seed,
        "training": config.model_dump(mode="json"),
    }
    slides = read_slides(data, samples)
    asked["groups"] = groups = slide_groups(slides, folds)
    made = make_folds(groups, hold_out)
    with lock_folder(output):
        with accelerator.main_process_first():
            _claim(output, asked, accelerator.is_main_process)
            for slide in slides.values():
                # without tuning, the head is trained on the features of all turns
                views = _VIEWS if config.tune == "linear" else 1
                extract_features(slide, start, features_of(output, slide_name(slide)), views=views, patch_um=side)
        task = _Task(data, slides, output, config, panel, n_genes, transform, side, seed, accelerator)
        rows = []
        for fold in made:
            folder = output / "folds" / fold.name
            if not (folder / "scores.json").exists():
                # a fold starts from the weights as they were loaded
                fresh = start if config.tune == "linear" else load_encoder(encoder, device=accelerator.device)
                _run_fold(fold, fresh, task)
            accelerator.wait_for_everyone()
            rows += read_json(folder / "scores.json")["rows"]
        path = output / "scores.json"
        if accelerator.is_main_process:
            if len({row["slide"] for row in rows}) > 1:
                rows += _means(rows)
            write_json(path, {"encoder": encoder, "transform": transform, "definitions": DEFINITIONS, "rows": rows})
            shutil.rmtree(output / "patches", ignore_errors=True)
        accelerator.wait_for_everyone()
        return path


DEFINITIONS = {
    "pcc_median": "median over genes of the Pearson correlation over spots",
    "pcc_mean": "mean over genes of the same; a gene that is constant in the measured slide is left out of both",
    "mse": "mean squared error over spots and genes, in units of the transform",
}


@dataclass(frozen=True)
class _Task:
    """What all folds have in common; as the arguments of `finetune_encoder`."""

    data: Path
    slides: dict[str, AnnData]
    output: Path
    config: FinetuneConfig
    panel: Panel | None
    n_genes: int
    transform: str
    patch_um: float
    seed: int
    accelerator: Accelerator


def _run_fold(fold: Fold, encoder: Encoder, task: _Task) -> None:
    """Train on a fold's slides, then predict and score those held out; `encoder` may be changed."""
    slides, output, config, transform = task.slides, task.output, task.config, task.transform
    patch_um, seed, accelerator = task.patch_um, task.seed, task.accelerator
    folder, main = output / "folds" / fold.name, accelerator.is_main_process
    panel = task.panel or select_panel([slides[name] for name in fold.train], n_genes=task.n_genes)
    tables = [load_spots(slides[name], panel, transform) for name in fold.train]
    spots = concatenate_spots(tables)

    def frozen(name: str, barcodes) -> np.ndarray:
        """Features (n, views, d) of the encoder as it was loaded."""
        return read_features(features_of(output, name), barcodes=list(barcodes), digest=encoder.digest).features

    views = np.concatenate([frozen(name, table.barcodes) for name, table in zip(fold.train, tables, strict=True)])
    groups = spot_groups(spots.slide, spots.coords)
    ridge = fit_ridge(views[:, 0], spots.values, groups)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GeneRegressor(encoder, len(panel.genes))
    if config.start == "ridge":
        _start_head(model, views[:, 0], spots.values, groups)
    cache = output / "patches"
    if config.tune == "linear":

        def inputs(rows: np.ndarray, turns: np.ndarray) -> Tensor:
            return torch.from_numpy(views[rows, turns])
    else:
        with accelerator.main_process_first():
            patches = [
                _cut_patches(slides[name], encoder, patch_um, cache / f"{name}.npy", table.barcodes)
                for name, table in zip(fold.train, tables, strict=True)
            ]
        inputs = _patch_inputs(patches)  # type: ignore[assignment]
        if config.tune == "lora":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model.encoder = _with_adapters(model.encoder, config.lora_rank)
        else:
            model.encoder.requires_grad_(True)
    target = torch.from_numpy(spots.values)

    def batch_loss(module, step, rows, positions, generator) -> Tensor:
        turns = torch.randint(_VIEWS, (len(rows),), generator=generator).numpy()
        device = accelerator.device
        predicted = module(inputs(rows[positions], turns[positions]).to(device))
        error = (predicted.float() - target[rows[positions]].to(device)) ** 2
        return error.sum() / (len(rows) * target.shape[1])

    run_loop(
        model,
        batch_loss,
        len(spots),
        config,
        folder / "training",
        seed,
        accelerator=accelerator,
        description=f"fold {fold.name}",
    )
    if config.tune == "lora":
        model.encoder = model.encoder.merge_and_unload()
    if main:
        rows = []
        for name in fold.test:
            slide = slides[name]
            if config.tune == "linear":
                with torch.inference_mode():
                    own = torch.from_numpy(frozen(name, slide.obs_names)[:, 0]).to(accelerator.device)
                    values = model(own).cpu().numpy()
            else:
                values = predict_slide(model, slide, encoder, patch_um)
            _write_prediction(output / "predictions" / f"{name}.h5ad", values, slide, panel.genes, transform)
            truth = load_spots(slide, panel, transform)
            kept = slide.obs_names.get_indexer(truth.barcodes)
            own = frozen(name, truth.barcodes)[:, 0]
            for method, predicted in (
                (config.tune, values[kept]),
                ("ridge on frozen features", ridge.predict(own)),
                ("mean of training spots", np.tile(spots.values.mean(axis=0), (len(kept), 1))),
            ):
                rows.append({"slide": name, "fold": fold.name, "method": method, **_scores(truth.values, predicted)})
        panel.save(folder / "panel.json")
        sizes = {
            key: float(np.median([slides[name].uns["hinge"][key] for name in fold.train]))
            for key in ("spot_pitch_um", "spot_diameter_um")
        }
        facts = {"data": str(task.data.resolve()), **sizes}
        _save_model(model, encoder, folder, config.tune, panel, transform, patch_um, fold, facts)
        write_json(folder / "scores.json", {"rows": rows})
        logger.info("fold %s: %s", fold.name, folder)


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each method the mean over slides, which count alike."""
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


# --- what goes in ------------------------------------------------------------------------------------


def features_of(output: Path, slide: str) -> Path:
    """Where the features of the encoder as it was loaded lie."""
    return output / "features" / f"{slide}.h5"


def _cut_patches(
    slide: AnnData, encoder: Encoder, patch_um: float, path: Path, barcodes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A slide's patches on disk, uint8 (n, H, W, 3), and the rows of some spots in them.

    Training reads spots in any order, and images are compressed by tile or as a whole: patches are cut once.
    """
    px = encoder.patch_px
    if not path.exists():
        with atomic_path(path) as temporary:
            stored = np.lib.format.open_memmap(temporary, "w+", np.uint8, (slide.n_obs, px, px, 3))
            for indices, patches in PatchReader(slide, patch_um, px):
                stored[indices] = patches
            stored.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False), slide.obs_names.get_indexer(barcodes)


def _patch_inputs(patches: list[tuple[np.ndarray, np.ndarray]]) -> Callable[[np.ndarray, np.ndarray], Tensor]:
    source = np.concatenate([np.full(len(rows), number) for number, (_, rows) in enumerate(patches)])
    place = np.concatenate([rows for _, rows in patches])

    def inputs(rows: np.ndarray, turns: np.ndarray) -> Tensor:
        batch = [_turned(patches[source[row]][0][place[row]], turn) for row, turn in zip(rows, turns, strict=True)]
        return torch.from_numpy(np.stack(batch))

    return inputs


def _turned(patch: np.ndarray, view: int) -> np.ndarray:
    """One of the eight views of a patch (H, W, 3), numbered as `dihedral_views` numbers them."""
    turned = np.rot90(patch, view % 4)
    return turned[:, ::-1] if view >= 4 else turned


# --- what is trained ---------------------------------------------------------------------------------


def _check_tunable(encoder: Encoder, tune: str) -> None:
    if tune == "linear":
        return
    if isinstance(encoder.module, Joined):
        raise ConfigError(f"joined encoders ({encoder.name}) can be tuned linear only")
    if not any(True for _ in encoder.module.parameters()):
        raise ConfigError(f"encoder {encoder.name} has no weights to tune; only tune linear goes with it")
    if tune == "lora":
        names = [name for name, part in encoder.module.named_modules() if isinstance(part, nn.Linear)]
        if not any(name.endswith(f".{end}") for name in names for end in ADAPTED):
            raise ConfigError(f"encoder {encoder.name} has no layers named {', '.join(ADAPTED)} to put adapters on")


def _with_adapters(module: nn.Module, rank: int) -> nn.Module:
    require("peft", "lora", "fine-tuning by low-rank adapters")
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(ADAPTED), bias="none")
    return get_peft_model(module, settings)


@torch.no_grad()
def _start_head(model: GeneRegressor, features: np.ndarray, values: np.ndarray, groups: np.ndarray) -> None:
    """Set the head to ridge regression on the frozen encoder: few steps at a small rate then suffice."""
    inputs = model.norm(torch.from_numpy(features).to(model.norm.weight.device)).cpu().numpy()
    fitted = fit_ridge(inputs, values, groups)
    scale, ridge = fitted["standardise"], fitted["regression"]
    weight = ridge.coef_.reshape(values.shape[1], -1) / scale.scale_
    model.linear.weight.copy_(torch.from_numpy(weight))
    model.linear.bias.copy_(torch.from_numpy(ridge.intercept_ - weight @ scale.mean_))


@torch.inference_mode()
def predict_slide(
    model: GeneRegressor, slide: AnnData, encoder: Encoder, patch_um: float, batch_size: int = 64
) -> np.ndarray:
    """Predicted values (n, G) float32 of all spots of a slide, in the slide's order."""
    model.eval()
    device = model.linear.weight.device
    values = np.empty((slide.n_obs, model.linear.out_features), np.float32)
    progress = tqdm(total=slide.n_obs, desc=f"predict {slide_name(slide)}", unit="spot", disable=None)
    with progress:
        for indices, patches in PatchReader(slide, patch_um, encoder.patch_px, batch_size):
            values[indices] = model(torch.from_numpy(patches).to(device)).float().cpu().numpy()
            progress.update(len(indices))
    return values


# --- what is written ---------------------------------------------------------------------------------


def _write_prediction(path: Path, values: np.ndarray, slide: AnnData, genes: list[str], transform: str) -> None:
    result = AnnData(X=values)
    result.obs_names, result.var_names = slide.obs_names, genes
    result.obsm["spatial"] = slide.obsm["spatial"]
    result.uns["hinge"] = {**slide.uns["hinge"], "transform": transform}
    with atomic_path(path) as temporary:
        result.write_h5ad(temporary, compression="gzip")


def _claim(output: Path, asked: dict[str, Any], main: bool) -> None:
    path = output / "config.json"
    if path.exists():
        there = read_json(path)
        differing = [key for key, value in asked.items() if there.get(key) != value]
        if differing:
            raise ConfigError(f"{output} was made with another {differing[0]}; choose another output folder")
    elif main:
        write_json(path, asked)


def _save_model(model, encoder, folder, tune, panel, transform, patch_um, fold, facts) -> None:
    with atomic_path(folder / "head.safetensors") as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in model.head().items()}, temporary)
    name = encoder.name
    if tune != "linear":
        name = save_tuned_encoder(model.encoder, encoder, folder / "encoder", patch_um)
    write_json(
        folder / "model.json",
        {
            "encoder": name,
            "tune": tune,
            "patch_um": patch_um,
            "genes": panel.genes,
            "transform": transform,
            "train": list(fold.train),
            "test": list(fold.test),
            **facts,
        },
    )


def save_tuned_encoder(module: nn.Module, encoder: Encoder, folder: Path, patch_um: float) -> str:
    """Write a tuned encoder so that `load_encoder` loads it.

    Parameters
    ----------
    module
        The tuned network.
    encoder
        What it was before.
    folder
        Gets `model.safetensors` and, where timm alone can build the network, its `config.json`.
    patch_um
        Side of the patches that it was tuned on.

    Returns
    -------
    str
        The name under which `load_encoder` takes it: the folder, or `RECIPE@FILE`.
    """
    core = module.vit if isinstance(module, PooledTokens) else module
    described = _timm_config(module, encoder)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in core.state_dict().items()}
        save_file(tensors, temporary / "model.safetensors")
        if described is not None:
            write_json(temporary / "config.json", {**described, "patch_um": patch_um})
    recipe = encoder.name.partition("@")[0].removeprefix("random:")
    return str(folder.resolve()) if described is not None else f"{recipe}@{folder.resolve() / 'model.safetensors'}"


def _timm_config(module: nn.Module, encoder: Encoder) -> dict[str, Any] | None:
    """timm's config.json for a network, None where its recipe is more than a timm model."""
    plain = encoder.name.partition("@")[0].removeprefix("random:")
    recipe, folder = RECIPES.get(plain), Path(encoder.name)
    core = module.vit if isinstance(module, PooledTokens) else module
    facts = dict(getattr(core, "pretrained_cfg", None) or {})
    architecture, arguments, licence = facts.get("architecture"), {}, facts.get("license")
    if recipe is not None:
        architecture, arguments, licence = recipe.architecture, dict(recipe.arguments), recipe.licence
        if recipe.pooling != "cls" or not timm.is_model(architecture):
            return None
    else:
        config = (folder if folder.is_dir() else folder.parent) / "config.json"
        if folder.exists() and config.is_file():
            content = read_json(config)
            architecture, arguments = content.get("architecture", architecture), dict(content.get("model_args") or {})
            licence = content.get("licence")
        elif recorded := getattr(core, "model_args", None):
            arguments = dict(recorded)
    try:
        json.dumps(arguments)
        with torch.device("meta"):
            rebuilt = timm.create_model(architecture, num_classes=0, **arguments).state_dict()
    except (TypeError, ValueError, RuntimeError):
        rebuilt = {}
    if {name: t.shape for name, t in rebuilt.items()} != {name: t.shape for name, t in core.state_dict().items()}:
        if recipe is not None:
            return None
        raise ConfigError(f"encoder {encoder.name} can be tuned linear only: timm cannot tell how to build it again")
    transform: Preprocess = encoder.transform
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.dim,
        "model_args": arguments,
        **({} if licence is None else {"licence": licence}),
        "pretrained_cfg": {
            "input_size": [3, transform.patch_px, transform.patch_px],
            "mean": list(transform.mean),
            "std": list(transform.std),
            "interpolation": transform.interpolation.value,
            **{key: facts[key] for key in ("fixed_input_size", "first_conv", "classifier") if key in facts},
        },
    }


def load_regressor(folder: str | Path, device: str | torch.device | None = None):
    """The encoder and head of a finished fold.

    Parameters
    ----------
    folder
        `folds/<name>` of `finetune_encoder`.
    device
        Where it computes; None: CUDA if there is one.

    Returns
    -------
    tuple
        `GeneRegressor` in eval mode, its `Encoder`, and what `model.json` says.
    """
    folder = Path(folder)
    about = read_json(folder / "model.json")
    name = about["encoder"]
    if about["tune"] != "linear" and (folder / "encoder").is_dir():
        # the folder may have been moved since
        weights = folder / "encoder" / "model.safetensors"
        name = f"{name.partition('@')[0]}@{weights}" if "@" in name else str(folder / "encoder")
    encoder = load_encoder(name, device=device)
    model = GeneRegressor(encoder, len(about["genes"]))
    head = load_file(folder / "head.safetensors")
    if {key: t.shape for key, t in head.items()} != {key: t.shape for key, t in model.head().items()}:
        raise DataError(f"{folder / 'head.safetensors'} does not fit encoder {name} and {len(about['genes'])} genes")
    model.load_state_dict(head, strict=False)
    return model.to(encoder.device).eval().requires_grad_(False), encoder, about
