"""A run: its folder, and the stages that fill it.

    config.yaml        the resolved configuration
    environment.json   versions and device
    panel.json         genes, chosen from the training slides
    genes.json         which of them the backbone knows, where its weights come from elsewhere
    features/          one HDF5 file per slide and encoder (unless features.folder says otherwise)
    backbone/          the expression model, where it was pre-trained in this run
    split.json         slides and validation spots
    training/          log and checkpoints
    model/             the trained HingeModel and its scheduler
    samples/           draws, one h5ad a slide
    baselines/         denoisers of the generative baselines, where evaluation.baselines names some
    scores.json, report.html

Each stage reads what the one before wrote, recognises what is finished and can be run again.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData
from pydantic import ValidationError
from tqdm import tqdm

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.backbones.cellfm import read_config
from hinge.backbones.checkpoints import vocabulary_for
from hinge.backbones.vocabulary import GeneMapping, GeneNames, GeneVocabulary, OnMissing
from hinge.config import BackboneConfig, RunConfig, explain, load_config, save_config
from hinge.data.draws import read_draws, same_draws, write_draws
from hinge.data.features import read_features
from hinge.data.neighbourhood import slide_features, spot_positions
from hinge.data.observed import read_observed
from hinge.data.panel import Panel, select_panel
from hinge.data.readers import list_samples, read_slide
from hinge.data.readers.h5ad import positive_length
from hinge.data.readers.table import images_alone
from hinge.data.slide import slide_name
from hinge.data.spots import SpotTable, concatenate_spots, load_spots
from hinge.data.transforms import get_transform
from hinge.diffusion import HingePipeline, MaskedDiffusionScheduler
from hinge.diffusion.gaussian import Denoiser, NoiseSchedule, draw_gaussian
from hinge.diffusion.likelihood import chain_log_likelihood
from hinge.encoders import Encoder, extract_features, load_encoder
from hinge.evaluation.baselines import BASELINES, GENERATIVE_BASELINES, Prediction
from hinge.evaluation.metrics.gene_sets import read_gene_sets
from hinge.evaluation.metrics.likelihood import marginal_log_likelihood, oracle_log_likelihood
from hinge.evaluation.oracle import oracle_prediction
from hinge.evaluation.predictions import PredictionFiles, read_prediction
from hinge.evaluation.scores import evaluate_slide, prediction_from_draws, write_scores
from hinge.models import HingeModel
from hinge.models.heads import COUNT_HEADS, needs_library_size
from hinge.report import report_slide, write_report
from hinge.training import pretrain_expression, split_spots, train_denoiser, train_hinge
from hinge.training.loop import make_accelerator, write_environment
from hinge.utils.errors import ConfigError, DataError, WeightsError, one_line
from hinge.utils.files import arrays_digest, atomic_path, file_digest, read_json, write_json
from hinge.utils.locks import lock_file, lock_folder
from hinge.utils.memory import with_less_memory
from hinge.utils.resumable import ResumableArrays

logger = logging.getLogger(__name__)

# batches in a part of a slide's draws: what is drawn again if sampling is killed
BATCHES_IN_A_PART = 8


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
    def config_path(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def panel_path(self) -> Path:
        return self.folder / "panel.json"

    @property
    def backbone_path(self) -> Path:
        own, settings = self.folder / "backbone", self.config.backbone
        return own if settings.path is None or settings.weights == "random" else settings.path

    @property
    def genes_path(self) -> Path:
        return self.folder / "genes.json"

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

    def _slide_to_sample(self, name: str) -> AnnData:
        """A slide of the data set by name; of one that a table gives without counts, spots as in training."""
        data = self.config.data
        if data.table is None or name not in images_alone(data.table):
            return self.slide(name)
        pitch, diameter = self.spot_grid()
        return read_slide(data.path, name, require_counts=False, spot_pitch_um=pitch, spot_diameter_um=diameter)

    def slide_at(self, path: Path, um_per_px: float | None = None) -> AnnData:
        """A slide from elsewhere, to be sampled; over an image alone spots are laid as in training."""
        pitch, diameter = self.spot_grid()
        return read_slide(
            path, um_per_px=um_per_px, require_counts=False, spot_pitch_um=pitch, spot_diameter_um=diameter
        )

    def spot_grid(self) -> tuple[float, float]:
        """Distance between the training slides' spots and their diameter, µm."""
        written = self.folder / "split.json"
        facts = read_json(written) if written.exists() else {}
        if not isinstance(facts, dict) or "spot_pitch_um" not in facts:
            facts = self._training_grid()
        pitch, diameter = (positive_length(facts, key) for key in ("spot_pitch_um", "spot_diameter_um"))
        if math.isnan(pitch):
            raise DataError(f"the training slides of {self.folder} do not tell the distance between their spots")
        return pitch, pitch / 2 if math.isnan(diameter) else diameter

    def _training_grid(self) -> dict[str, float]:
        slides = [self.slide(name).uns["hinge"] for name in self.config.data.train]
        return {
            key: float(np.median([facts[key] for facts in slides])) for key in ("spot_pitch_um", "spot_diameter_um")
        }

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:
            self._encoder = load_encoder(self.config.features.encoder)
        return self._encoder

    def panel(self) -> Panel:
        """The panel; chosen from the training slides and written if it is not there yet.

        Genes that a backbone from elsewhere does not know are dropped from it, unless `backbone.unknown_genes`
        says otherwise.
        """
        config = self.config.panel
        if not self.panel_path.exists():
            if config.method == "file":
                panel = read_panel(config.file)
            else:
                panel = select_panel([self.slide(name) for name in self.config.data.train], config.method, config.genes)
            if self.config.backbone.path is not None:
                panel = panel.model_copy(update={"genes": self._match_panel(panel.genes)})
            panel.save(self.panel_path)
            logger.info("wrote %s (%d genes)", self.panel_path, len(panel.genes))
        return Panel.load(self.panel_path)

    def features(self, slide: AnnData) -> Path:
        """The feature file of a slide, extracted if it is not there yet."""
        settings, path = self.config.features, self.features_path(slide_name(slide))
        # runs may share a folder of features: what another one is extracting is waited for
        with lock_file(path, wait=True):
            return extract_features(
                slide,
                self.encoder,
                path,
                views=settings.views,
                batch_size=settings.batch_size,
                patch_um=settings.patch_um,
            )

    def spots(self, names: list[str]) -> SpotTable:
        """Spots of some slides on the panel, with features; spots without a count are left out."""
        panel, tables = self.panel(), []
        for name in names:
            slide = self.slide(name)
            path = self.features(slide)
            table = load_spots(slide, panel, self.config.transform, path)
            rows = slide.obs_names.get_indexer(table.barcodes)
            tables.append(replace(table, features=self.conditions(slide, path)[rows]))
        return concatenate_spots(tables)

    def conditions(self, slide: AnnData, path: Path) -> np.ndarray:
        """What the model is told of every spot of a slide: float32 (n, V, d); `path` is the slide's feature file.

        The features of its patch and, where the configuration says so, those of its neighbours, in units of the
        slide's own mean and standard deviation.
        """
        settings = self.config.features
        stored = read_features(path, barcodes=list(slide.obs_names), digest=self.encoder.digest)
        return slide_features(
            stored.features, slide.obsm["spatial"], settings.neighbourhood, settings.standardise_slide
        )

    def backbone(self) -> CellFMModel:
        """The expression model, from elsewhere or pre-trained in this run, in the type its weights are stored in.

        Raises
        ------
        WeightsError
            It is missing or damaged.
        """
        settings = self.config.backbone
        model = CellFMModel.from_pretrained(self.backbone_path, **settings.constants())
        if settings.unknown_genes == "new":
            mapping = self._match(self.panel().genes, "new")
            ids = dict(zip(mapping.genes, mapping.ids.tolist(), strict=True))
            model.add_genes({gene: ids[gene] for gene in mapping.new}, self.config.seed)
        return model

    def pretraining_values(self) -> np.ndarray:
        """Transformed counts (n, G), on the panel, of the slides to pre-train on, or if none are named to train on."""
        genes, values, data = self.panel().genes, [], self.config.data
        if not data.pretrain:
            logger.info("data.pretrain names no samples: the expression model is pre-trained on the training slides")
        for name in data.pretrain or data.train:
            slide = self.slide(name, require_image=False)
            values.append(panel_values(slide, genes, self.config.transform))
            self._slides.pop(name, None)  # it holds counts of all genes; the panel is all that is needed
        return stack_values(values, genes)

    def gene_ids(self, backbone: CellFMModel) -> torch.Tensor:
        """Vocabulary ids (G,) of the panel."""
        on_missing: OnMissing = "new" if self.config.backbone.unknown_genes == "new" else "error"
        ids = torch.from_numpy(self._match(self.panel().genes, on_missing).ids)
        if ids.max() >= backbone.gene_embedding.num_embeddings:
            raise WeightsError(f"this backbone has no embedding for the new genes of {self.panel_path}")
        return ids

    @cached_property
    def vocabulary(self) -> GeneVocabulary:
        """The genes that the backbone knows, from `backbone.vocabulary` or else stored with its weights.

        Raises
        ------
        WeightsError
            Neither is there, or the file is of other weights.
        """
        # a random backbone has the vocabulary of the weights it is made like
        source = self.config.backbone.path or self.backbone_path
        file, backbone = self.config.backbone.vocabulary, read_config(source)
        if file is not None:
            return vocabulary_for(file, backbone.num_embeddings)
        if not backbone.gene_names:
            raise WeightsError(f"the backbone {source} brings no gene vocabulary; name its file as backbone.vocabulary")
        return GeneVocabulary.from_genes(backbone.gene_names)

    def _match(self, genes: list[str], on_missing: OnMissing) -> GeneMapping:
        table = self.config.backbone.gene_names
        return self.vocabulary.match(genes, on_missing, GeneNames(table) if table is not None else None)

    def _match_panel(self, genes: list[str]) -> list[str]:
        """The genes of a panel that stay in it; tells and writes what the backbone knows of them and of the slides."""
        mapping = self._match(genes, self.config.backbone.unknown_genes)
        dropped = len(genes) - len(mapping.genes)
        end = f"; {dropped} dropped from the panel (backbone.unknown_genes: new keeps them)" if dropped else ""
        logger.info("panel: %s%s", mapping.summary(), end)
        slides = {}
        for name in self.config.data.train:
            known = self._match(list(self.slide(name).var_names), "drop")
            slides[name] = {"genes": self.slide(name).n_vars, "mapped": len(known.genes), "summary": known.summary()}
            logger.info("%s: %d of %d genes are in the vocabulary", name, len(known.genes), self.slide(name).n_vars)
        report = {
            "vocabulary": str(self.config.backbone.vocabulary or self.backbone_path),
            "panel": {
                "genes": len(genes),
                "mapped": len(mapping.rules),
                "summary": mapping.summary(),
                "harmonised": mapping.harmonised,
                "missing": mapping.missing,
                "duplicates": mapping.duplicates,
                "dropped": [gene for gene in genes if gene not in mapping.genes],
                "new": mapping.new,
            },
            "slides": slides,
        }
        write_json(self.genes_path, report)
        logger.info("wrote %s", self.genes_path)
        return mapping.genes

    def pipeline(self) -> HingePipeline:
        """The trained model and its scheduler, ready to sample.

        Raises
        ------
        DataError
            The run has not been trained.
        """
        if not (self.model_path / HingeModel.config_name).exists():
            raise DataError(f"{self.folder} holds no trained model; run hinge train first")
        path = self.model_path / "scheduler_config.json"
        try:
            scheduler = MaskedDiffusionScheduler.from_config(read_json(path))
        except (TypeError, ValueError, AttributeError, OSError) as error:
            raise WeightsError(f"{path} describes no scheduler: {one_line(error)}") from error
        backbone = self.backbone()
        model = HingeModel.from_pretrained(self.model_path, backbone)
        backbone.float()  # draws are made in float32, whatever the weights are stored in
        return HingePipeline(model, scheduler)

    # --- stages ----------------------------------------------------------------------------------

    def pretrain(self) -> Path:
        """Do what is missing of panel and backbone, where that is pre-trained in this run; the backbone's folder.

        Raises
        ------
        ConfigError
            The folder holds a run with other settings.
        """
        with lock_folder(self.folder):
            with self._undone_on_error():
                self._claim()
                finished = (self.backbone_path / "config.json").exists()
                values = None if finished else self.pretraining_values()
            if not finished:
                self._pretrain(values)
                logger.info("wrote %s", self.backbone_path)
            return self.backbone_path

    def _pretrain(self, values: np.ndarray) -> CellFMModel:
        settings, genes = self.config.backbone, self.panel().genes
        size = CellFMConfig(**settings.architecture())
        return pretrain_expression(values, genes, size, settings.pretrain, self.backbone_path, seed=self.config.seed)

    def train(self) -> Path:
        """Do what is missing of panel, features, backbone and training; the trained model's folder.

        Raises
        ------
        ConfigError
            The folder holds a run with other settings.
        """
        if (self.model_path / HingeModel.config_name).exists():
            self._claim()
            logger.info("%s is finished", self.model_path)
            return self.model_path
        with lock_folder(self.folder):
            return self._train()

    def _train(self) -> Path:
        config, settings = self.config.training, self.config.backbone
        accelerator = make_accelerator(config, self.folder / "training")
        # one process reads slides, chooses genes and extracts features; the others then find them
        with accelerator.main_process_first(), self._undone_on_error():
            self._claim()
            data = self.config.data
            unknown = [name for name in data.test if name not in list_samples(data.path, data.format)]
            if unknown:
                raise DataError(f"there is no sample {unknown[0]!r} in {data.path}, and data.test names it")
            self._encoder = load_encoder(self.config.features.encoder)  # a wrong name is told before slides are read
            spots = self.spots(data.train)
            if settings.weights == "random" and not (self.backbone_path / "config.json").exists():
                self._write_random_backbone()
            pretrained = self.backbone_path == settings.path or (self.backbone_path / "config.json").exists()
            if pretrained:
                backbone = self.backbone()
                self.gene_ids(backbone)
            else:
                values = self.pretraining_values()
            if accelerator.is_main_process:
                write_environment(self.folder / "environment.json")
        if not pretrained:
            backbone = self._pretrain(values)
            accelerator = make_accelerator(config, self.folder / "training")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = HingeModel.from_backbone(
                backbone,
                spots.features.shape[2],
                spots.values.shape[1],
                transform=self.config.transform,
                tuning=settings.tuning,
                lora_rank=settings.lora_rank,
                **self.config.model.model_dump(exclude={"library_size"}),
                library_size=needs_library_size(self.config.model.head, self.config.transform)
                if self.config.model.library_size is None
                else self.config.model.library_size,
            )
        model.cast_backbone(torch.bfloat16 if config.precision == "bf16" else torch.float32)
        scheduler = MaskedDiffusionScheduler(**self.config.diffusion.model_dump())
        if accelerator.is_main_process:
            self._write_split(spots)
            frozen = sum(parameter.numel() for parameter in backbone.parameters() if not parameter.requires_grad)
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
        observed: Path | None = None,
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
        observed
            h5ad with measured counts of some genes in some or all spots: they stay as they are, and the rest is drawn
            given them. See `hinge.data.observed.read_observed`.
        """
        if slide is None:
            slide = self._slide_to_sample(name)
        settings = self.config.sampling
        draws, steps = draws or settings.draws, steps or settings.steps
        if steps > self.config.diffusion.num_train_timesteps:
            raise ConfigError(
                f"{steps} steps cannot be taken, the run has diffusion.num_train_timesteps "
                f"{self.config.diffusion.num_train_timesteps}"
            )
        seed = settings.seed if seed is None else seed
        name = slide_name(slide)
        output = output or self.samples_path(name)
        pipeline = self.pipeline()
        about = {
            "transform": self.config.transform,
            "seed": seed,
            "draws": draws,
            "steps": steps,
            "observed": "" if observed is None else file_digest(observed),
            **{
                key: getattr(settings, key)
                for key in ("spatially_correlated", "order", "remasking", "temperature", "precision")
            },
            "model_digest": pipeline.model.digest(),
            "backbone_digest": pipeline.model.config.backbone_digest,
            "encoder": self.encoder.name,
            "encoder_digest": self.encoder.digest,
        }
        if output.exists() and same_draws(output, about, slide):
            logger.info("%s is finished", output)
            return output
        with lock_file(output):
            measured = library_size = None
            if observed is not None:
                measured, library_size = read_observed(observed, slide, self.panel().genes, self.config.transform)
            accelerator = make_accelerator(self.config.training)
            with accelerator.main_process_first():
                path = self.features(slide)
            features = self.conditions(slide, path)[:, 0]
            gene_ids = self.gene_ids(pipeline.model.backbone)
            if settings.precision == "bf16":
                pipeline.model.backbone.to(torch.bfloat16)
            pipeline.model.to(accelerator.device)
            effect = None
            if measured is not None and settings.spatially_correlated:
                effect = pipeline.slide_effect(features, measured, library_size)
            spots, positions = [f"{name}/{barcode}" for barcode in slide.obs_names], None
            if settings.spatially_correlated:
                positions = spot_positions(slide.obsm["spatial"])
            batch_size = batch_size or settings.batch_size
            genes = self.panel().genes
            size = max(1, BATCHES_IN_A_PART * batch_size // draws)
            conditions = arrays_digest({"features": features, "place": slide.obsm["spatial"], "names": np.array(spots)})
            unfinished = ResumableArrays(
                output,
                {**about, "conditions": conditions},
                {
                    "values": ((draws, slide.n_obs, len(genes)), np.float32, 1),
                    "expected": ((slide.n_obs, len(genes)), np.float32, 0),
                },
                slide.n_obs,
                size,
            )
            if accelerator.is_main_process:
                unfinished.prepare()
            accelerator.wait_for_everyone()
            missing = unfinished.missing()
            accelerator.wait_for_everyone()  # or a quick process would finish a part before another one looks
            mine = missing[accelerator.process_index :: accelerator.num_processes]
            silent = None if accelerator.is_main_process else True
            bar = tqdm(total=sum(part.stop - part.start for _, part in mine), unit="spot", disable=silent)
            with bar, unfinished.kept() if accelerator.num_processes == 1 else contextlib.nullcontext():
                for number, part in mine:
                    draw = partial(  # type: ignore[misc]
                        pipeline,
                        features[part],
                        gene_ids,
                        spots[part],
                        num_draws=draws,
                        num_inference_steps=steps,
                        seed=seed,
                        slide=None if positions is None else name,
                        positions=None if positions is None else positions[part],
                        observed=None if measured is None else measured[part],
                        library_size=None if library_size is None else library_size[part],
                        slide_effect=effect,
                        order=settings.order,
                        remasking=settings.remasking,
                        temperature=settings.temperature,
                        progress=False,
                    )
                    result, batch_size = with_less_memory(batch_size, lambda size, draw=draw: draw(batch_size=size))  # type: ignore[misc]
                    unfinished.write(number, part, result.values, result.expected)
                    bar.update(part.stop - part.start)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                values, expected = unfinished.read()
                write_draws(output, values, expected, slide, genes, about)
                unfinished.remove()
                logger.info("wrote %s (%d draws of %d spots)", output, draws, slide.n_obs)
            accelerator.wait_for_everyone()
            return output

    def evaluate(
        self,
        slides: list[str] | None = None,
        predictions: list[PredictionFiles] | None = None,
        output: Path | None = None,
    ) -> Path:
        """Score the draws of the test slides, and predictions of other programs, beside the baselines.

        Parameters
        ----------
        slides
            Names; None for the test slides.
        predictions
            Of other programs. With them, slides of which this run has no draws are scored too.
        output
            Where the scores go; None for `scores.json` in the run's folder.

        Returns
        -------
        Path
            The file of scores.
        """
        slides = slides or self.config.data.test
        if not slides:
            raise ConfigError(f"{self.folder} names no test slides; give --slide")
        for name in slides:
            if not self.samples_path(name).exists() and not predictions:
                raise DataError(f"there are no draws of {name} in {self.folder / 'samples'}; run hinge sample first")
        settings, seed = self.config.evaluation, self.config.seed
        gene_sets = None if settings.gene_sets is None else read_gene_sets(settings.gene_sets)
        train = self.spots(self.config.data.train)
        generative = [method for method in settings.baselines if method in GENERATIVE_BASELINES]
        denoisers = {method: self._denoiser(method, train) for method in generative}
        evaluations, failed = [], {}
        for name in slides:
            try:
                test = self.spots([name])
            except DataError as error:
                if len(slides) == 1:
                    raise
                logger.error("slide %s failed: %s", name, error)
                failed[name] = str(error)
                continue
            n_draws, own = self.config.sampling.draws, []
            if self.samples_path(name).exists():
                draws = read_draws(self.samples_path(name))
                n_draws = int(draws.uns["hinge"]["draws"])
                own.append(prediction_from_draws(draws, test))
            own += [read_prediction(files, test) for files in predictions or []]
            own += [self._denoised(denoisers[method], method, test, n_draws) for method in generative]
            if "hinge_truth" in self.slide(name).uns:
                own.append(oracle_prediction(self.slide(name), test, n_draws, seed))
            evaluations.append(
                evaluate_slide(
                    train,
                    test,
                    own,
                    baselines=[method for method in settings.baselines if method in BASELINES],
                    gene_sets=gene_sets,
                    n_draws=n_draws,
                    n_resamples=settings.bootstrap,
                    seed=seed,
                )
            )
        if not evaluations:
            raise DataError(f"no slide could be scored: {'; '.join(failed.values())}")
        written = write_scores(output or self.scores_path, evaluations)
        if failed:
            raise DataError(
                f"{len(failed)} of {len(slides)} slides could not be scored, the others are in {written}: "
                + "; ".join(f"{name} ({reason})" for name, reason in failed.items())
            )
        return written

    def log_likelihoods(self, name: str) -> dict[str, float] | None:
        """How probable a slide's measured counts on the panel are, mean over spots in nats.

        Returns
        -------
        dict
            `model` (see `chain_log_likelihood`), `marginal`, and on simulated tissue `oracle` and `share`, the model's
            gain over the marginal as a share of the oracle's. None for a head whose values are no counts.
        """
        if self.config.model.head not in COUNT_HEADS:
            return None
        pipeline, device = self.pipeline(), make_accelerator(self.config.training).device
        pipeline.model.to(device)
        test, train = self.spots([name]), self.spots(self.config.data.train)
        of_model = chain_log_likelihood(
            pipeline.model,
            pipeline.scheduler,
            test.features[:, 0],
            self.gene_ids(pipeline.model.backbone),
            test.values,
            _spot_names(test),
            seed=self.config.sampling.seed,
            library_size=None if pipeline.model.library_size_model is None else test.library_size,
        )
        means = {"model": of_model.mean(), "marginal": marginal_log_likelihood(train.counts, test.counts).mean()}
        if "hinge_truth" in self.slide(name).uns:
            means["oracle"] = oracle_log_likelihood(self.slide(name), test, seed=self.config.seed).mean()
            means["share"] = (means["model"] - means["marginal"]) / (means["oracle"] - means["marginal"])
        return {key: float(value) for key, value in means.items()}

    def _denoiser(self, method: str, train: SpotTable) -> Denoiser:
        """The denoiser of a generative baseline; trained, and kept in `baselines/`, if it is not there yet."""
        folder, config = self.folder / "baselines" / method, self.config.training
        backbone, settings = self.backbone(), self.config.backbone
        if (folder / "model" / HingeModel.config_name).exists():
            denoiser = Denoiser.from_pretrained(folder / "model", backbone)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                model = HingeModel.from_backbone(
                    backbone,
                    train.features.shape[2],
                    train.values.shape[1],
                    head="point",
                    tuning=settings.tuning,
                    lora_rank=settings.lora_rank,
                    **self.config.model.model_dump(exclude={"head", "library_size"}),
                )
            model.cast_backbone(torch.bfloat16 if config.precision == "bf16" else torch.float32)
            values = torch.from_numpy(train.values)
            denoiser = Denoiser(model, NoiseSchedule(method), self.gene_ids(backbone), values)
            with lock_folder(folder):
                train_denoiser(denoiser, train, config, folder / "training", seed=self.config.seed)
                denoiser.save_pretrained(folder / "model")
            logger.info("wrote %s", folder / "model")
        bf16 = self.config.sampling.precision == "bf16"
        denoiser.model.backbone.to(torch.bfloat16 if bf16 else torch.float32)
        return denoiser.to(make_accelerator(config).device).eval()

    def _denoised(self, denoiser: Denoiser, method: str, test: SpotTable, n_draws: int) -> Prediction:
        """Draws of a generative baseline; its mean is theirs."""
        device = denoiser.mean.device
        draw = partial(
            draw_gaussian,
            denoiser,
            denoiser.schedule,
            torch.from_numpy(np.asarray(test.features[:, 0], dtype=np.float32)).to(device),
            _spot_names(test),
            test.values.shape[1],
            num_draws=n_draws,
            seed=self.config.sampling.seed,
        )
        draws, _ = with_less_memory(self.config.sampling.batch_size, lambda size: draw(batch_size=size))
        values = denoiser.expression(torch.from_numpy(draws).to(device)).clamp_min(0).cpu().numpy()
        return Prediction(method, mean=values.mean(axis=0, dtype=np.float64), draws=values)

    def report(self) -> Path:
        """Write and return `report.html` from the scores and draws that are there."""
        if not self.scores_path.exists():
            raise DataError(f"there are no scores in {self.folder}; run hinge evaluate first")
        scores = read_json(self.scores_path)
        names = list(dict.fromkeys(row["slide"] for row in scores["rows"]))
        names = [name for name in names if self.samples_path(name).exists()]
        slides = [report_slide(read_draws(self.samples_path(name)), self.slide(name)) for name in names]
        settings = self.config.model_dump(mode="json", exclude={"output"})
        return write_report(self.report_path, scores, slides, f"hinge: {self.folder.name}", settings)

    def all(self) -> Path:
        """Train, sample the test slides, evaluate, report; the report's path."""
        with lock_folder(self.folder):
            self.train()
            for name in self.config.data.test:
                self.sample(name)
            self.evaluate()
            return self.report()

    def _claim(self) -> None:
        """Write config.yaml, or make sure that the one there says the same."""
        if not self.config_path.exists():
            save_config(self.config, self.config_path)
            return
        # how it is sampled and scored may change from call to call; where it lies does not matter
        here, there = (
            config.model_dump(mode="json", exclude={"output", "sampling", "evaluation"})
            for config in (self.config, load_config(self.config_path))
        )
        key = _difference(here, there)
        if key is not None:
            raise ConfigError(f"{self.folder} holds a run with another {key}; choose another output folder")

    @contextlib.contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Remove what a run wrote that could not start: it must not stand in the way of the next try."""
        files = [self.config_path, self.panel_path, self.genes_path, self.folder / "environment.json"]
        written = [file for file in files if not file.exists()]
        try:
            yield
        except BaseException:
            for file in written:
                file.unlink(missing_ok=True)
            for folder in (self.folder / "features", self.folder):
                with contextlib.suppress(OSError):  # not there, or not empty: kept
                    folder.rmdir()
            raise

    def _write_random_backbone(self) -> None:
        """A backbone with the weights that pre-training starts from."""
        settings, genes = self.config.backbone, self.panel().genes
        if settings.path is None:
            config = CellFMConfig(num_genes=len(genes), gene_names=genes, **settings.architecture())
        else:
            config = read_config(settings.path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = CellFMModel(config)
        with atomic_path(self.backbone_path) as temporary:
            model.save_pretrained(temporary)
        logger.info("wrote %s (random weights)", self.backbone_path)

    def _write_split(self, spots: SpotTable) -> None:
        data, config = self.config.data, self.config.training
        _, held = split_spots(spots, config.validation_share, config.validation_groups, self.config.seed)
        write_json(
            self.folder / "split.json",
            {
                "train": data.train,
                "test": data.test,
                "pretrain": data.pretrain,
                **self._training_grid(),
                "validation_spots": [f"{spots.slide[index]}/{spots.barcodes[index]}" for index in held],
            },
        )


def evaluate_files(
    data: Path,
    samples: list[str],
    panel: Path,
    transform: str,
    predictions: list[PredictionFiles],
    output: Path,
    gene_sets: Path | None = None,
    seed: int = 0,
) -> Path:
    """Score predictions of other programs on measured slides, without a run: no baselines that need features.

    Parameters
    ----------
    data, samples
        Data set and its samples that were predicted.
    panel
        File with the genes that are scored.
    transform
        Units of the scores.
    predictions
        Where the predictions lie.
    output
        The file of scores to write.
    gene_sets
        File for the scores of modules; None for the built-in markers.
    seed
        Of the noise ceiling, folds and resamples.

    Returns
    -------
    Path
        `output`.
    """
    sets = None if gene_sets is None else read_gene_sets(gene_sets)
    genes, evaluations = read_panel(panel), []
    for name in samples:
        slide = read_slide(data, name, require_image=False)
        test = load_spots(slide, genes, transform)
        methods = [read_prediction(files, test) for files in predictions]
        if "hinge_truth" in slide.uns:
            methods.append(oracle_prediction(slide, test, seed=seed))
        evaluations.append(evaluate_slide(None, test, methods, gene_sets=sets, seed=seed))
    return write_scores(output, evaluations, reference=predictions[0].method)


def read_panel(path: Path) -> Panel:
    """A panel from panel.json, or from a text file with one gene symbol a line."""
    if path.suffix == ".json":
        return Panel.load(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
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


def stack_values(values: list[np.ndarray], genes: list[str]) -> np.ndarray:
    """Several slides' `panel_values` below each other; a gene that none of them has is a DataError."""
    stacked = np.concatenate(values)
    missing = [gene for gene, known in zip(genes, np.isfinite(stacked).any(axis=0), strict=True) if not known]
    if missing:
        raise DataError(
            f"{len(missing)} genes of the panel are in none of the files to pre-train on: {', '.join(missing[:5])}"
        )
    return stacked


def _spot_names(spots: SpotTable) -> list[str]:
    """The names by which the randomness of draws goes."""
    return [f"{slide}/{barcode}" for slide, barcode in zip(spots.slide, spots.barcodes, strict=True)]


def _difference(here: dict, there: dict) -> str | None:
    """First key, with dots for sections, at which two configurations differ."""
    for key, value in here.items():
        other = there.get(key)
        if value == other:
            continue
        return f"{key}.{_difference(value, other)}" if isinstance(value, dict) else key
    return None


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
        Keys of `BackboneConfig` and of its `pretrain`.
    seed
        Of the weights and the masks.
    """
    try:
        config = BackboneConfig.model_validate({**architecture, "pretrain": settings})
    except ValidationError as error:
        raise ConfigError(f"pre-training cannot start: {explain(error, BackboneConfig)}") from error
    listed = [(path, sample) for path in paths for sample in list_samples(path)]
    unknown = sorted(set(samples or []) - {sample for _, sample in listed})
    if unknown:
        raise DataError(f"there is no sample {', '.join(unknown)} in {', '.join(map(str, paths))}")
    slides = [
        read_slide(path, sample, require_image=False) for path, sample in listed if samples is None or sample in samples
    ]
    if panel is not None:
        genes = read_panel(panel).genes
    else:
        genes = sorted(set.intersection(*(set(slide.var_names) for slide in slides)))
        if not genes:
            raise DataError("the count files share no gene; give --panel")
    values = stack_values([panel_values(slide, genes, transform) for slide in slides], genes)
    size = CellFMConfig(**config.architecture())
    return pretrain_expression(values, genes, size, config.pretrain, output, seed=seed)
