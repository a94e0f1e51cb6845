"""A run: its folder, and the stages that fill it.

    config.yaml        the resolved configuration
    environment.json   versions and device
    panel.json         genes, chosen from the training slides
    features/          one HDF5 file per slide and encoder (unless features.folder says otherwise)
    backbone/          the expression model, where it was pre-trained in this run
    split.json         slides and validation spots
    training/          log and checkpoints
    model/             the trained HingeModel and its scheduler
    samples/           draws, one h5ad a slide
    scores.json, report.html

Each stage reads what the one before wrote, recognises what is finished and can be run again.
"""

import logging
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from anndata import AnnData

from hinge.backbones import CellFMConfig, CellFMModel, PretrainConfig, pretrain_expression
from hinge.config import RunConfig, check_config, load_config, save_config
from hinge.data.panel import Panel, select_panel
from hinge.data.readers import list_samples, read_slide
from hinge.data.slide import slide_name
from hinge.data.spots import SpotTable, concatenate_spots, load_spots
from hinge.data.transforms import get_transform
from hinge.diffusion import HingePipeline, MaskedDiffusionScheduler
from hinge.encoders import Encoder, extract_features, load_encoder
from hinge.errors import ConfigError, DataError, WeightsError
from hinge.evaluation.oracle import oracle_prediction
from hinge.evaluation.score import evaluate_slide, prediction_from_draws, write_scores
from hinge.files import atomic_path, read_json, write_json
from hinge.loop import make_accelerator, write_environment
from hinge.models import HingeModel
from hinge.report import report_slide, write_report
from hinge.training import TrainingConfig, split_spots, train_hinge

logger = logging.getLogger(__name__)


class Run:
    """One run's configuration, files and slides.

    Parameters
    ----------
    config
        Its `output` is the run's folder.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.folder = Path(config.output)
        self._slides: dict[str, AnnData] = {}
        self._encoder: Encoder | None = None

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """The run in a folder, finished or not.

        Raises
        ------
        DataError
            The folder holds no run.
        """
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise DataError(f"{folder} is not the folder of a run: config.yaml is missing")
        config = load_config(folder / "config.yaml")
        # the folder may have been moved since
        return cls(config.model_copy(update={"output": folder.resolve()}))

    # --- files -----------------------------------------------------------------------------------

    @property
    def panel_path(self) -> Path:
        return self.folder / "panel.json"

    @property
    def model_path(self) -> Path:
        return self.folder / "model"

    @property
    def scores_path(self) -> Path:
        return self.folder / "scores.json"

    @property
    def report_path(self) -> Path:
        return self.folder / "report.html"

    def features_path(self, slide: str) -> Path:
        folder = self.config.features.folder or self.folder / "features"
        encoder = self.config.features.encoder.replace("/", "_").replace(":", "_")
        return folder / f"{slide}.{encoder}.h5"

    def samples_path(self, slide: str) -> Path:
        return self.folder / "samples" / f"{slide}.h5ad"

    # --- what the files hold ---------------------------------------------------------------------

    def slide(self, name: str, require_image: bool = True) -> AnnData:
        """A slide of the data set by name."""
        if name not in self._slides:
            data = self.config.data
            self._slides[name] = read_slide(data.path, name, format=data.format, require_image=require_image)
        return self._slides[name]

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:
            self._encoder = load_encoder(self.config.features.encoder)
        return self._encoder

    def panel(self) -> Panel:
        """The panel; chosen from the training slides and written if it is not there yet."""
        config = self.config.panel
        if not self.panel_path.exists():
            if config.method == "file":
                panel = read_panel(config.file)
            else:
                panel = select_panel([self.slide(name) for name in self.config.data.train], config.method, config.genes)
            panel.save(self.panel_path)
            logger.info("wrote %s (%d genes)", self.panel_path, len(panel.genes))
        return Panel.load(self.panel_path)

    def features(self, slide: AnnData) -> Path:
        """The feature file of a slide, extracted if it is not there yet."""
        settings = self.config.features
        return extract_features(
            slide,
            self.encoder,
            self.features_path(slide_name(slide)),
            views=settings.views,
            batch_size=settings.batch_size,
            patch_um=settings.patch_um,
        )

    def spots(self, names: list[str]) -> SpotTable:
        """Spots of some slides on the panel, with features; spots without a count are left out."""
        panel, tables = self.panel(), []
        for name in names:
            slide = self.slide(name)
            tables.append(load_spots(slide, panel, self.config.transform, self.features(slide)))
        return concatenate_spots(tables)

    def backbone(self) -> CellFMModel:
        """The expression model; pre-trained if it is not there yet."""
        settings = self.config.backbone
        here = self.folder / "backbone"
        if settings.path is not None or (here / "config.json").exists():
            return CellFMModel.from_pretrained(settings.path or here).eval()
        panel = self.panel()
        values = []
        for name in self.config.data.pretrain:
            slide = self.slide(name, require_image=False)
            values.append(panel_values(slide, panel.genes, self.config.transform))
            self._slides.pop(name)  # it holds counts of all genes; the panel is all that is needed
        return pretrain_expression(
            np.concatenate(values),
            panel.genes,
            CellFMConfig(
                hidden_size=settings.hidden_size,
                num_hidden_layers=settings.num_hidden_layers,
                num_attention_heads=settings.num_attention_heads,
                num_value_bins=settings.num_value_bins,
            ),
            PretrainConfig(**settings.pretrain),
            here,
            seed=self.config.seed,
        )

    def gene_ids(self, backbone: CellFMModel) -> torch.Tensor:
        """Vocabulary ids (G,) of the panel."""
        vocabulary = {gene: index + 1 for index, gene in enumerate(backbone.config.gene_names or [])}
        if not vocabulary:
            raise WeightsError(f"the backbone {self.config.backbone.path} brings no gene vocabulary")
        missing = [gene for gene in self.panel().genes if gene not in vocabulary]
        if missing:
            raise DataError(
                f"{len(missing)} genes of the panel are not in the backbone's vocabulary: {', '.join(missing[:5])}"
            )
        return torch.tensor([vocabulary[gene] for gene in self.panel().genes])

    def pipeline(self) -> HingePipeline:
        """The trained model and its scheduler, ready to sample.

        Raises
        ------
        DataError
            The run has not been trained.
        """
        if not (self.model_path / HingeModel.config_name).exists():
            raise DataError(f"{self.folder} holds no trained model; run hinge train first")
        scheduler = MaskedDiffusionScheduler.from_config(read_json(self.model_path / "scheduler_config.json"))
        return HingePipeline(HingeModel.from_pretrained(self.model_path, self.backbone()), scheduler)

    # --- stages ----------------------------------------------------------------------------------

    def train(self) -> Path:
        """Do what is missing of panel, features, backbone and training; the trained model's folder.

        Raises
        ------
        ConfigError
            The folder holds a run with other settings.
        """
        self._claim()
        accelerator = make_accelerator(TrainingConfig(**self.config.training))
        # one process reads slides, chooses genes and extracts features; the others then find them
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                write_environment(self.folder / "environment.json")
            spots = self.spots(self.config.data.train)
        backbone = self.backbone()
        if (self.model_path / HingeModel.config_name).exists():
            logger.info("%s is finished", self.model_path)
            return self.model_path
        config = TrainingConfig(**self.config.training)
        accelerator = make_accelerator(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = HingeModel.from_backbone(
                backbone, spots.features.shape[2], spots.values.shape[1], **self.config.model.model_dump()
            )
        if config.precision == "bf16":
            backbone.to(torch.bfloat16)
        scheduler = MaskedDiffusionScheduler(**self.config.diffusion.model_dump())
        if accelerator.is_main_process:
            self._write_split(spots, config)
            frozen = sum(parameter.numel() for parameter in backbone.parameters())
            logger.info("%s trainable parameters, %s frozen", f"{model.num_trainable():,}", f"{frozen:,}")
        result = train_hinge(
            model,
            scheduler,
            self.gene_ids(backbone),
            spots,
            config,
            self.folder / "training",
            seed=self.config.seed,
            accelerator=accelerator,
        )
        if accelerator.is_main_process:
            with atomic_path(self.model_path) as temporary:
                model.to("cpu").save_pretrained(temporary)
                scheduler.save_config(temporary)
            logger.info("wrote %s (weights of step %s)", self.model_path, result.best_step or result.step)
        accelerator.wait_for_everyone()
        return self.model_path

    def sample(
        self,
        name: str | None = None,
        slide: AnnData | None = None,
        output: Path | None = None,
        draws: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> Path:
        """Draw the expression of a slide's spots; finished draws with the same settings are kept.

        Parameters
        ----------
        name
            A slide of the data set, or
        slide
            any slide with an image.
        output
            Where the h5ad goes; by default `samples/<slide>.h5ad` in the run's folder.
        draws, steps, seed, batch_size
            As in the configuration where None.
        """
        if slide is None:
            slide = self.slide(name)
        settings = self.config.sampling
        draws, steps = draws or settings.draws, steps or settings.steps
        seed = settings.seed if seed is None else seed
        name = slide_name(slide)
        output = output or self.samples_path(name)
        pipeline = self.pipeline()
        about = {
            "transform": self.config.transform,
            "seed": seed,
            "draws": draws,
            "steps": steps,
            "model_digest": pipeline.model.digest(),
            "backbone_digest": pipeline.model.config.backbone_digest,
            "encoder": self.encoder.name,
            "encoder_digest": self.encoder.digest,
        }
        if output.exists() and _same_draws(output, about, name):
            logger.info("%s is finished", output)
            return output
        from hinge.data.features import read_features

        features = read_features(self.features(slide), barcodes=list(slide.obs_names), digest=self.encoder.digest)
        accelerator = make_accelerator(TrainingConfig(**self.config.training))
        pipeline.model.to(accelerator.device)
        mine = np.array_split(np.arange(slide.n_obs), accelerator.num_processes)[accelerator.process_index]
        spots = [f"{name}/{barcode}" for barcode in slide.obs_names]
        result = pipeline(
            features.features[mine, 0],
            self.gene_ids(pipeline.model.backbone),
            [spots[index] for index in mine],
            num_draws=draws,
            num_inference_steps=steps,
            seed=seed,
            batch_size=batch_size or settings.batch_size,
            progress=accelerator.is_main_process,
        )
        from accelerate.utils import gather_object

        parts = gather_object([(result.values, result.expected)])
        if accelerator.is_main_process:
            values = np.concatenate([part[0] for part in parts], axis=1)
            expected = np.concatenate([part[1] for part in parts], axis=0)
            write_draws(output, values, expected, slide, self.panel().genes, about)
            logger.info("wrote %s (%d draws of %d spots)", output, draws, slide.n_obs)
        accelerator.wait_for_everyone()
        return output

    def evaluate(self, slides: list[str] | None = None) -> Path:
        """Score the draws of the test slides beside the baselines; write and return `scores.json`."""
        slides = slides or self.config.data.test
        if not slides:
            raise ConfigError(f"{self.folder} names no test slides; give --slide")
        train = self.spots(self.config.data.train)
        rows = []
        for name in slides:
            path = self.samples_path(name)
            if not path.exists():
                raise DataError(f"there are no draws of {name} in {path.parent}; run hinge sample first")
            test = self.spots([name])
            draws = read_draws(path)
            n_draws, seed = int(draws.uns["hinge"]["draws"]), self.config.seed
            predictions = [prediction_from_draws(draws, test)]
            if "hinge_truth" in self.slide(name).uns:
                predictions.append(oracle_prediction(self.slide(name), test, n_draws, seed))
            rows += evaluate_slide(train, test, predictions, n_draws=n_draws, seed=seed)
        return write_scores(self.scores_path, rows)

    def report(self) -> Path:
        """Write and return `report.html` from the scores and draws that are there."""
        scores = read_json(self.scores_path)
        names = list(dict.fromkeys(row["slide"] for row in scores["rows"]))
        slides = [report_slide(read_draws(self.samples_path(name)), self.slide(name)) for name in names]
        settings = self.config.model_dump(mode="json", exclude={"output"})
        return write_report(self.report_path, scores, slides, f"hinge: {self.folder.name}", settings)

    def all(self) -> Path:
        """Train, sample the test slides, evaluate, report; the report's path."""
        self.train()
        for name in self.config.data.test:
            self.sample(name)
        self.evaluate()
        return self.report()

    def _claim(self) -> None:
        """Write config.yaml, or make sure that the one there says the same."""
        path = self.folder / "config.yaml"
        if not path.exists():
            save_config(self.config, path)
            return
        there = load_config(path).model_dump(mode="json")
        here = check_config(self.config.model_dump(mode="json"), "the configuration").model_dump(mode="json")
        for key in here:
            # how it is sampled may change from call to call; where it lies does not matter
            if key not in ("output", "sampling") and here[key] != there[key]:
                inner = key
                if isinstance(here[key], dict):
                    inner = next(f"{key}.{name}" for name in here[key] if here[key][name] != there[key].get(name))
                raise ConfigError(f"{self.folder} holds a run with another {inner}; choose another output folder")

    def _write_split(self, spots: SpotTable, config: TrainingConfig) -> None:
        _, held = split_spots(spots, config.validation_share, config.validation_groups, self.config.seed)
        data = self.config.data
        write_json(
            self.folder / "split.json",
            {
                "train": data.train,
                "test": data.test,
                "pretrain": data.pretrain,
                "validation_spots": [f"{spots.slide[index]}/{spots.barcodes[index]}" for index in held],
            },
        )


def read_panel(path: Path) -> Panel:
    """A panel from panel.json, or from a text file with one gene symbol a line."""
    if path.suffix == ".json":
        return Panel.load(path)
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the genes in {path}: {error}") from error
    return Panel.from_list([line.strip() for line in lines if line.strip()])


def panel_values(slide: AnnData, genes: list[str], transform: str) -> np.ndarray:
    """Transformed counts (n, G) of a slide on a list of genes; NaN columns for genes it lacks.

    Spots without a count in these genes are left out.
    """
    columns = slide.var_names.get_indexer(genes)
    counts = slide.X[:, np.maximum(columns, 0)].toarray().astype(np.float32)
    counts[:, columns < 0] = np.nan
    total = np.asarray(slide.X.sum(axis=1), dtype=np.float32).ravel()
    values = get_transform(transform).forward(counts, total)
    return values[np.nansum(counts, axis=1) > 0]


def write_draws(
    path: str | Path, values: np.ndarray, expected: np.ndarray, slide: AnnData, genes: list[str], about: dict
) -> None:
    """Write draws as AnnData: X the mean, layers std, expected and draw_000 ….

    Parameters
    ----------
    path
        The h5ad file.
    values
        (K, n, G) draws.
    expected
        (n, G) the head's mean averaged over draws.
    slide
        Where the spots lie; its name, image and coordinates go along.
    genes
        G symbols.
    about
        What is needed to repeat the draws; goes to `uns["hinge"]`.
    """
    result = AnnData(X=values.mean(axis=0, dtype=np.float64).astype(np.float32))
    result.obs_names, result.var_names = slide.obs_names, genes
    result.layers["std"] = values.std(axis=0, dtype=np.float64).astype(np.float32)
    result.layers["expected"] = expected
    for number, draw in enumerate(values):
        result.layers[f"draw_{number:03d}"] = draw
    result.obsm["spatial"] = slide.obsm["spatial"]
    result.uns["spatial"] = slide.uns.get("spatial", {})
    result.uns["hinge"] = {**slide.uns["hinge"], **about}
    with atomic_path(path) as temporary:
        result.write_h5ad(temporary, compression="gzip")


def read_draws(path: str | Path) -> AnnData:
    """Read what `write_draws` wrote."""
    try:
        draws = ad.read_h5ad(path)
    except Exception as error:
        raise DataError(f"{path} is not a readable h5ad file: {error}") from error
    if "draws" not in draws.uns.get("hinge", {}):
        raise DataError(f"{path} holds no draws: uns['hinge'] does not describe any")
    return draws


def _same_draws(path: Path, about: dict, name: str) -> bool:
    there = read_draws(path).uns["hinge"]
    return there.get("name") == name and all(there.get(key) == value for key, value in about.items())


def pretrain_on_files(
    paths: list[Path],
    output: Path,
    samples: list[str] | None,
    panel: Path | None,
    transform: str,
    architecture: dict,
    settings: dict,
    seed: int,
) -> CellFMModel:
    """Pre-train an expression backbone on the counts of files and folders.

    Parameters
    ----------
    paths
        h5ad files, or folders that `read_slide` knows.
    output
        Folder for the backbone.
    samples
        Only these; None for all.
    panel
        File with the genes of the vocabulary; None for the genes all files share.
    transform
        Units of the values.
    architecture, settings
        Of `CellFMConfig` and `PretrainConfig`.
    seed
        Of the weights and the masks.
    """
    try:
        config = PretrainConfig(**settings)
        size = CellFMConfig(**architecture)
    except ValueError as error:
        raise ConfigError(f"these settings cannot be used: {' '.join(str(error).split())}") from error
    slides = [
        read_slide(path, sample, require_image=False)
        for path in paths
        for sample in list_samples(path)
        if samples is None or sample in samples
    ]
    if not slides:
        raise DataError(f"there are no such samples in {', '.join(map(str, paths))}")
    if panel is not None:
        genes = read_panel(panel).genes
    else:
        genes = sorted(set.intersection(*(set(slide.var_names) for slide in slides)))
        if not genes:
            raise DataError("the count files share no gene; give --panel")
    values = np.concatenate([panel_values(slide, genes, transform) for slide in slides])
    return pretrain_expression(values, genes, size, config, output, seed=seed)
