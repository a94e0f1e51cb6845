"""What the stages of a run share: its slides, panel, features, spots and backbone.

What needs torch is imported where it is used: reports and viewers read slides alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData

from hinge.config import RunConfig
from hinge.data.checks import Context, Finding, check_slide, require_codes, stop_on_errors
from hinge.data.checks.species import species_of_genes
from hinge.data.condition_tokens import ConditionTokens, categories_of_slide
from hinge.data.count_table import CountTable, read_counts
from hinge.data.features import difference_from, read_feature_header, read_features
from hinge.data.kept_slides import KeptSlides
from hinge.data.neighbourhood import slide_features
from hinge.data.panel import Panel, read_panel, select_panel
from hinge.data.pseudo_spots import pool_cells
from hinge.data.readers import build_slide, table
from hinge.data.resolution import positive_length
from hinge.data.slide import patient_of_slide, slide_name
from hinge.data.slide_sequence import SlideSequence
from hinge.data.spots import Lacking, SpotTable, concatenate_spots, load_spots
from hinge.run.genes import GeneMatcher
from hinge.run.paths import RunPaths
from hinge.utils import checksums
from hinge.utils.errors import DataError, WeightsError
from hinge.utils.files import read_json
from hinge.utils.locks import lock_file
from hinge.utils.resumable import remove_leftovers

if TYPE_CHECKING:
    import torch

    from hinge.backbones import ExpressionBackbone
    from hinge.backbones.vocabulary import OnMissing
    from hinge.encoders import Encoder

logger = logging.getLogger(__name__)

IN_MEMORY_BYTES = 4 << 30
"""Features, counts and values of all training spots, above which `training.store: auto` trains from disk."""

# a slide holds the counts of all genes: those with an image, which takes long to decode, are kept up to these bytes
_KEPT_BYTES = 128 << 20
_SLIDES_AT_ONCE = 64  # that the panel is selected from
# counts to pre-train on beside a store of training spots: as many as have these bytes, but at least these spots
_PRETRAINING_BYTES, _MOST_PRETRAINING_SPOTS = 64 << 20, 10_000
_GRID = ("spot_pitch_um", "spot_diameter_um")


class Preparation:
    """Inputs of the stages, made and written when they are first needed.

    Parameters
    ----------
    config
        The configuration of the run.
    opened
        As of `RunPaths`.
    """

    def __init__(self, config: RunConfig, opened: bool = False):
        self.config, self.paths = config, RunPaths(config, opened)
        self.matcher = GeneMatcher(config.backbone, self.paths.backbone)
        self._with_image = KeptSlides(lambda name: self._read_slide(name, True), _KEPT_BYTES)
        self._counts_alone = lru_cache(maxsize=2)(lambda name: self._read_slide(name, False))
        self._grids: dict[str, dict[str, float]] = {}
        self._species: dict[str, str] = {}
        self._patients: dict[str, str | None] = {}
        self._num_spots: dict[str, int] = {}
        self._counts: CountTable | None = None

    # --- slides ----------------------------------------------------------------------------------

    def slide(self, name: str, require_image: bool = True) -> AnnData:
        """Return a slide of the data set by name."""
        return self._with_image(name) if require_image else self._counts_alone(name)

    def _read_slide(self, name: str, require_image: bool) -> AnnData:
        data = self.config.data
        slide = build_slide(
            data.path,
            name,
            format=data.format,
            image=data.images.get(name) if require_image else None,
            um_per_px=data.um_per_px.get(name),
            require_image=require_image,
            spot_um=data.spot_um,
        )
        self._grids[name] = {key: slide.uns["hinge"][key] for key in _GRID}
        self._patients[name], self._num_spots[name] = patient_of_slide(slide), slide.n_obs
        return slide

    def num_spots(self, name: str) -> int:
        """Return the number of spots of a slide, which is read at most once for it."""
        if name not in self._num_spots:
            self.slide(name)
        return self._num_spots[name]

    def check(self, names: Sequence[str], allow: Collection[str] = ()) -> None:
        """Check slides that are trained on or scored, before anything is computed; each is checked once.

        Raises
        ------
        DataError
            A slide has a finding that is an error and whose code is not allowed, or slides are of several species.
        """
        require_codes(allow)
        context = Context(self._target_um_per_px(), self._given_panel())
        for name in names:
            if name in self._species:
                continue
            slide = self.slide(name)
            findings = check_slide(slide, context)
            if self._slides_may_lack_genes():
                findings = [each for each in findings if each.code != "genes-panel"]
            stop_on_errors(slide, findings, allow)
            self._species[name] = species_of_genes(slide.var_names)
        kinds = {species: name for name, species in self._species.items() if species}
        if len(kinds) > 1 and "genes-species" not in allow:
            told = ", ".join(f"{name} has genes of {species}" for species, name in kinds.items())
            raise DataError(f"the slides are of several species: {told}; take slides of one, or --allow genes-species")

    def check_to_sample(self, slide: AnnData, allow: Collection[str] = ()) -> None:
        """Check a slide that is sampled, which may lack genes of the panel.

        Raises
        ------
        DataError
            It has a finding that is an error and whose code is not allowed.
        """
        stop_on_errors(slide, self.findings_to_sample(slide), allow)

    def findings_to_sample(self, slide: AnnData) -> list[Finding]:
        """Return what is wrong, or may be, with a slide that is sampled."""
        panel = self.panel().genes if self.paths.panel.exists() else ()
        findings = check_slide(slide, Context(self._target_um_per_px(), panel))
        return [each for each in findings if each.code != "genes-panel"]

    def _slides_may_lack_genes(self) -> bool:
        settings = self.config.panel
        masked = settings.method == "union" or settings.min_slides is not None
        return masked or (self.paths.panel.exists() and bool(self.panel().shares))

    def _target_um_per_px(self) -> float:
        return (self.config.features.patch_um or self.encoder.patch_um) / self.encoder.patch_px

    def _given_panel(self) -> Sequence[str]:
        """Return the panel if it does not depend on the slides; genes that the backbone has are looked up later."""
        if self.paths.panel.exists():
            return self.panel().genes
        settings = self.config.panel
        return read_panel(settings.file).genes if settings.method == "file" and settings.file else ()

    def slide_to_sample(self, name: str) -> AnnData:
        """Return a slide of the data set; on an image without counts, place spots at the pitch of training."""
        path = self.config.data.path
        if table.recognises(path) and name in table.images_alone(path):
            return self.slide_at(path, sample=name)
        return self.slide(name)

    def slide_at(
        self,
        path: Path,
        um_per_px: float | None = None,
        sample: str | None = None,
        image: Path | None = None,
        spot_um: float | None = None,
    ) -> AnnData:
        """Return a slide outside the data set; on an image without counts, place spots at the pitch of training.

        Cells are pooled in squares of `spot_um`, by default as the cells that the run was trained on.
        """
        pitch, diameter = self.spot_grid()
        slide = build_slide(
            path,
            sample,
            image=image,
            um_per_px=um_per_px,
            require_counts=False,
            spot_um=spot_um,
            spot_pitch_um=pitch,
            spot_diameter_um=diameter,
        )
        as_trained = self.config.data.spot_um
        are_cells = slide.uns["hinge"].get("source", {}).get("objects") == "cells"
        return pool_cells(slide, as_trained) if as_trained is not None and are_cells else slide

    def spot_grid(self) -> tuple[float, float]:
        """Return the distance between the training slides' spots and their diameter, µm."""
        facts = read_json(self.paths.split) if self.paths.split.exists() else {}
        if not isinstance(facts, dict) or "spot_pitch_um" not in facts:
            facts = self.training_grid()
        pitch, diameter = (positive_length(facts, key) for key in _GRID)
        if math.isnan(pitch):
            raise DataError(f"the training slides of {self.paths.folder} have no spot pitch")
        return pitch, pitch / 2 if math.isnan(diameter) else diameter

    def training_grid(self) -> dict[str, float]:
        """Return the median spot pitch and diameter of the training slides, µm."""
        names = self.config.data.train
        for name in names:
            if name not in self._grids:
                self.slide(name)
        return {key: float(np.median([self._grids[name][key] for name in names])) for key in _GRID}

    # --- panel and features ----------------------------------------------------------------------

    def panel(self) -> Panel:
        """Return the panel; select and write it if it is not there yet.

        Genes outside the vocabulary of given weights are dropped from it, unless `backbone.unknown_genes` is `new`.
        """
        if not self.paths.panel.exists():
            settings, training = self.config.panel, self.config.data.train
            slides: Sequence[AnnData] = SlideSequence(training, self.slide)
            if self.config.training.store != "disk" and len(training) <= _SLIDES_AT_ONCE:
                slides = list(slides)  # they are read several times
            if settings.method == "file":
                panel = read_panel(settings.file)
            else:
                panel = select_panel(slides, settings.method, settings.genes, settings.min_slides or 1)
            if settings.method == "file" and settings.min_slides is not None:
                panel = panel.of_slides(slides, settings.min_slides)
            if self.config.backbone.path is not None:
                symbols = {name: list(self.slide(name).var_names) for name in training}
                panel = panel.model_copy(update={"genes": self.matcher.select(panel.genes, symbols, self.paths.genes)})
            panel.save(self.paths.panel)
            logger.info("wrote %s (%d genes)", self.paths.panel, len(panel.genes))
        return Panel.load(self.paths.panel)

    @cached_property
    def encoder(self) -> Encoder:
        """The histology encoder."""
        from hinge.encoders import load_encoder

        digest = self._of_model.get("encoder_digest")
        encoder = load_encoder(self.config.features.encoder_name)
        if digest is not None and encoder.digest != digest:
            raise WeightsError(
                f"the encoder {encoder.name} has other weights, or another pooling, than the model in "
                f"{self.paths.folder} was trained with: "
                f"digest {encoder.digest[:12]}, not {digest[:12]}"
            )
        return encoder

    @property
    def encoder_digest(self) -> str:
        """The digest of the histology encoder; a trained run knows it without loading the encoder."""
        return self._of_model.get("encoder_digest") or self.encoder.digest

    @cached_property
    def _of_model(self) -> dict[str, Any]:
        """What is known of the encoder that the model was trained with, {} without a model."""
        if not (self.paths.has_model and self.paths.index.is_file()):
            return {}
        content = read_json(self.paths.index)
        settings = content.get("settings") if isinstance(content, dict) else None
        return settings if isinstance(settings, dict) else {}

    def features(self, slide: AnnData) -> Path:
        """Return the feature file of a slide; extract it if it is not there yet."""
        settings, path = self.config.features, self.paths.features(slide_name(slide))
        if path.exists() and self._is_finished(path, slide):
            if path.is_relative_to(self.paths.folder):
                remove_leftovers(path)
            return path
        from hinge.encoders import extract_features

        if settings.folder is not None and path.parent != settings.folder:
            logger.info("features.folder %s is outside of %s: writing %s", settings.folder, self.paths.folder, path)
        # runs may share a folder of features: wait for what another one is extracting
        with lock_file(path, wait=True):
            return extract_features(slide, self.encoder, path, views=settings.views, patch_um=settings.patch_um)

    def _is_finished(self, path: Path, slide: AnnData) -> bool:
        """Return whether a file holds the features that a trained run needs, without loading the encoder: seconds."""
        settings, known = self.config.features, [self._of_model.get(key) for key in ("encoder_digest", "patch_um")]
        return None not in known and (
            difference_from(path, slide, settings.encoder, known[0], settings.views, known[1]) is None
        )

    def conditions(self, slide: AnnData, path: Path, categories: Mapping[str, str | None] | None = None) -> np.ndarray:
        """Return the condition of every spot of a slide: float32 (n, V, d).

        It consists of the features of the patch and, with `features.neighbourhood`, their mean over the neighbourhood,
        both standardised in the slide with `features.standardise_slide`, and the columns of the condition tokens.
        `path` is the slide's feature file, `categories` those of the tokens; None: as the slide's metadata say.
        """
        settings = self.config.features
        stored = read_features(path, barcodes=list(slide.obs_names), digest=self.encoder_digest)
        features = slide_features(
            stored.features, slide.obsm["spatial"], settings.neighbourhood, settings.standardise_slide
        )
        given = categories_of_slide(slide, self.config.condition.tokens) if categories is None else categories
        return self.tokens.append(features, given) if self.config.condition.tokens else features

    @cached_property
    def tokens(self) -> ConditionTokens:
        """The condition tokens and their categories on the training slides."""
        names = self.config.condition.tokens
        if self._of_model.get("tokens"):
            return ConditionTokens(self._of_model["tokens"])
        slides = [categories_of_slide(self.slide(name), names) for name in self.config.data.train if names]
        return ConditionTokens.of_slides(names, slides)

    def spots(self, names: list[str], lacking: Lacking | None = None) -> SpotTable:
        """Return the spots of some slides on the panel, with features; spots without a count are left out.

        `lacking` says what happens with genes that a slide lacks, see `load_spots`; None: they are masked in a panel
        whose genes slides may lack, and an error otherwise.
        """
        panel, tables = self.panel(), []
        lacking = lacking or ("mask" if panel.shares else "error")
        for name in names:
            slide = self.slide(name)
            path = self.features(slide)
            spots = load_spots(slide, panel, self.config.transform, path, lacking=lacking)
            rows = slide.obs_names.get_indexer(spots.barcodes)
            tables.append(replace(spots, features=self.conditions(slide, path)[rows]))
        spots = concatenate_spots(tables)
        return replace(spots, token_columns=tuple(self.tokens.columns(spots.features.shape[2])))

    def scored_spots(self, name: str) -> SpotTable:
        """Return the spots of a slide as `spots` does, on those genes of the panel that the slide has."""
        spots, wanted = self.spots([name], "drop"), len(self.panel().genes)
        if len(spots.genes) < wanted:
            logger.warning("slide %s has %d of the panel's %d genes: these are scored", name, len(spots.genes), wanted)
        return spots

    # --- backbone --------------------------------------------------------------------------------

    def backbone(self) -> ExpressionBackbone:
        """Return the backbone, given or pre-trained in this run, in the type of its file.

        Raises
        ------
        WeightsError
            It is missing or damaged.
        """
        from hinge.backbones import load_backbone

        settings = self.config.backbone
        model = load_backbone(checksums.verified(self.paths.backbone), **settings.constants())
        if settings.unknown_genes == "new":
            mapping = self.matcher.match(self.panel().genes, "new")
            ids = dict(zip(mapping.genes, mapping.ids.tolist(), strict=True))
            model.add_genes({gene: ids[gene] for gene in mapping.new}, self.config.seed)
        return model

    def gene_ids(self, backbone: ExpressionBackbone) -> torch.Tensor:
        """Return the vocabulary ids (G,) of the panel."""
        import torch

        on_missing: OnMissing = "new" if self.config.backbone.unknown_genes == "new" else "error"
        ids = torch.from_numpy(self.matcher.match(self.panel().genes, on_missing).ids)
        if ids.max() >= backbone.gene_embedding.num_embeddings:
            raise WeightsError(f"this backbone has no embedding for the new genes of {self.paths.panel}")
        return ids

    def pretraining_counts(self) -> CountTable:
        """Return the counts, on the panel, of the slides to pre-train the backbone on; they are read once."""
        if self._counts is None:
            self._counts = self._read_counts()
        return self._counts

    def _read_counts(self) -> CountTable:
        genes, data = self.panel().genes, self.config.data
        if not data.pretrain:
            logger.info("data.pretrain names no samples: the expression model is pre-trained on the training slides")
        slides = (self.slide(name, require_image=False) for name in data.pretrain or data.train)
        most = None
        if self.trains_from_disk:
            most = max(_MOST_PRETRAINING_SPOTS, _PRETRAINING_BYTES // (4 * len(genes))) // len(
                data.pretrain or data.train
            )
        return read_counts(slides, genes, self.patient, self.panel().shares, most)

    @cached_property
    def trains_from_disk(self) -> bool:
        """Whether training spots are read from a store on disk: `training.store`, or what `auto` decides."""
        training, data, features = self.config.training, self.config.data, self.config.features
        if training.store != "auto" or data.train_spots is not None:
            return training.store == "disk"
        size = len(self.panel().genes)  # before the encoder, which takes longer: genes may be wrong
        path = self.paths.features(data.train[0])
        if path.exists():
            header = read_feature_header(path)
            views, dim = header.n_views, header.dim
        else:
            views, dim = features.views, self.encoder.dim
        of_spot = 4 * (views * dim * (1 + features.neighbourhood) + 2 * size)
        return of_spot * sum(self.num_spots(name) for name in data.train) > IN_MEMORY_BYTES

    def known_tokens(self, names: list[str]) -> dict[str, np.ndarray] | None:
        """Return the categories (T,) of slides by name; None without tokens."""
        tokens = self.config.condition.tokens
        slides = (self.slide(name, require_image=False) for name in (names if tokens else ()))
        return {slide_name(each): self.tokens.known(categories_of_slide(each, tokens)) for each in slides} or None

    def patient(self, name: str) -> str:
        """Return the patient of a sample: of the table of slides, the first characters of its name, or of its file.

        A file names it in `obs["patient"]`. A sample without one is a patient of its own.
        """
        data = self.config.data
        if table.recognises(data.path) and (patient := table.read_table(data.path)[name]["patient"]):
            return patient
        if data.patient_prefix is not None:
            return name[: data.patient_prefix]
        if name not in self._patients:
            self.slide(name, require_image=False)
        return self._patients[name] or name


def spot_names(spots: SpotTable) -> list[str]:
    """Return the names (n,) that select the random numbers of each spot's draws."""
    return [f"{slide}/{barcode}" for slide, barcode in zip(spots.slide, spots.barcodes, strict=True)]
