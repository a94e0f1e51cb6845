"""Settings of a pipeline beside its weights, and how they are read from the folder of a run."""

import logging
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hinge.backbones import ExpressionBackbone, load_backbone, read_config
from hinge.backbones.hgnc import GeneNames
from hinge.backbones.vocabulary import OnMissing
from hinge.data.panel import Panel
from hinge.diffusion.inputs import SamplingSettings
from hinge.encoders.names import with_pooling
from hinge.utils import checksums
from hinge.utils.errors import DataError, WeightsError, one_line
from hinge.utils.files import read_json

logger = logging.getLogger(__name__)

BACKBONE_FOLDER = "backbone"

# sampling keys of a run's configuration → fields of SamplingSettings; earlier versions had the second names
_SAMPLING_KEYS = {
    "draws": "num_draws",
    "steps": "num_inference_steps",
    "seed": "seed",
    "batch_size": "batch_size",
    "spatially_correlated": "spatially_correlated",
    "coherent": "spatially_correlated",
    "remasking": "remasking",
    "corrections": "remasking",
}

# sampling keys of earlier versions, and the only value that is left
_REMOVED_KEYS = {"order": "random", "temperature": 1.0}


@dataclass(frozen=True)
class BackboneSource:
    """Location of the weights of a frozen backbone, and how they are read.

    Attributes
    ----------
    path
        A folder of `ExpressionBackbone.save_pretrained`, or a published file; relative to the pipeline's folder.
    constants
        `masked_input`, `negative_slope`, `layer_norm_eps` and `attention` where they differ from those of the weights.
    new_genes
        Gene → id of genes that get a new embedding.
    seed
        Of the new embeddings.
    """

    path: str = BACKBONE_FOLDER
    constants: dict[str, Any] = field(default_factory=dict)
    new_genes: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    def load(self, folder: Path) -> ExpressionBackbone:
        """Return the backbone, in the type its weights are stored in, of a pipeline in `folder`."""
        backbone = load_backbone(checksums.verified(folder / self.path), **self.constants)
        backbone.add_genes(self.new_genes, self.seed)
        return backbone


@dataclass(frozen=True)
class PipelineSettings:
    """Settings of a pipeline that draws a slide, beside its weights.

    Attributes
    ----------
    genes, gene_ids
        The panel: G symbols and their ids in the backbone's vocabulary.
    transform
        From counts to the model's units.
    encoder, encoder_digest
        Histology encoder of the features, as `load_encoder` takes it, and the digest of its weights; None: unknown.
    patch_um, feature_batch_size
        Side of a patch in µm (None: the encoder's own), and patches in one forward pass.
    neighbourhood, standardise_slide
        As for `hinge.data.neighbourhood.slide_features`.
    patients
        Patient of each slide that the run names, by the slide's name.
    spot_pitch_um, spot_diameter_um
        Distance and diameter of the training slides' spots; None: unknown.
    sampling
        Defaults of the pipeline's call.
    precision
        `no` for float32 or `bf16`: the type that the backbone computes in.
    backbone
        Source of the backbone.
    shares
        Share in all counts of every gene of the training slides; see `hinge.data.panel.Panel`.
    tokens
        Categories of the condition tokens, see `hinge.data.condition_tokens.ConditionTokens`.
    """

    genes: list[str]
    gene_ids: list[int]
    transform: str
    encoder: str
    encoder_digest: str | None = None
    patch_um: float | None = None
    feature_batch_size: int = 64
    neighbourhood: bool = False
    standardise_slide: bool = False
    patients: dict[str, str] = field(default_factory=dict)
    spot_pitch_um: float | None = None
    spot_diameter_um: float | None = None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    precision: str = "no"
    backbone: BackboneSource = field(default_factory=BackboneSource)
    shares: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON stores them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any], name: str = "the pipeline's settings") -> "PipelineSettings":
        """Return the settings that `to_dict` wrote; a DataError names what is wrong in `name`."""
        try:
            known = {each.name: content[each.name] for each in fields(cls) if each.name in content}
            known["sampling"] = SamplingSettings(**known["sampling"])
            known["backbone"] = BackboneSource(**known["backbone"])
            settings = cls(**known)
            if len(settings.genes) != len(settings.gene_ids) or not settings.genes:
                raise ValueError(f"{len(settings.genes)} genes have {len(settings.gene_ids)} ids")
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise DataError(f"{name} describes no pipeline: {one_line(error)}") from error
        return settings


def settings_of_run(folder: Path) -> PipelineSettings:
    """Return the settings of a run that wrote no `model_index.json`, from its configuration and panel.

    Raises
    ------
    DataError
        A file is missing or damaged.
    WeightsError
        The backbone is missing, or genes of the panel are not in its vocabulary.
    """
    config = read_run_config(folder)
    try:
        features, backbone = config["features"], config["backbone"]
        own = backbone.get("path") is None or backbone.get("weights") == "random"
        panel = Panel.load(folder / "panel.json")
        genes = panel.genes
        gene_ids, new_genes = _gene_ids(genes, folder, backbone)
        constants = ("masked_input", "negative_slope", "layer_norm_eps", "attention")
        grid = read_json(folder / "split.json") if (folder / "split.json").exists() else {}
        return PipelineSettings(
            genes=genes,
            gene_ids=gene_ids,
            transform=config["transform"],
            encoder=with_pooling(features["encoder"], features.get("pooling")),
            patch_um=features.get("patch_um"),
            feature_batch_size=features.get("batch_size", 64),
            neighbourhood=features.get("neighbourhood", features.get("neighbours", False)),
            standardise_slide=features.get("standardise_slide", False),
            patients=grid.get("patients", {}),
            spot_pitch_um=grid.get("spot_pitch_um"),
            spot_diameter_um=grid.get("spot_diameter_um"),
            sampling=sampling_of_run(config),
            precision=precision_of_run(config),
            backbone=BackboneSource(
                BACKBONE_FOLDER if own else backbone["path"],
                {key: backbone[key] for key in constants if backbone.get(key) is not None},
                new_genes,
                config.get("seed", 0),
            ),
            shares=panel.shares,
        )
    except (TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{folder / 'config.yaml'} is not the configuration of a run: {one_line(error)}") from error


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return the keys and values of a run's `config.yaml`."""
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(checksums.verified(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is not the configuration of a run")
    return config


def sampling_of_run(config: dict[str, Any]) -> SamplingSettings:
    """Return the sampling settings of a run's configuration, under their present or earlier names."""
    section = config.get("sampling") or {}
    for key, only in _REMOVED_KEYS.items():
        if section.get(key, only) != only:
            logger.warning("sampling.%s %s of this run is no longer supported; it is %s now", key, section[key], only)
    return SamplingSettings(**{_SAMPLING_KEYS[key]: value for key, value in section.items() if key in _SAMPLING_KEYS})


def precision_of_run(config: dict[str, Any]) -> str:
    """Return what the backbone computes in when a run is sampled: `no` for float32, or `bf16`."""
    return str((config.get("sampling") or {}).get("precision", "no"))


def _gene_ids(genes: list[str], folder: Path, backbone: dict[str, Any]) -> tuple[list[int], dict[str, int]]:
    """Return the vocabulary ids of a panel, and those of them that are new to the backbone."""
    own = folder / BACKBONE_FOLDER
    config = read_config(folder / backbone["path"] if backbone.get("path") is not None else own)
    file = backbone.get("vocabulary")
    vocabulary = config.read_vocabulary(None if file is None else folder / file)
    if vocabulary is None:
        raise WeightsError(f"the backbone of {folder} has no gene vocabulary; name its file as backbone.vocabulary")
    on_missing: OnMissing = "new" if backbone.get("unknown_genes") == "new" else "error"
    table = backbone.get("gene_names")
    mapping = vocabulary.match(genes, on_missing, None if table is None else GeneNames(folder / table))
    ids = dict(zip(mapping.genes, mapping.ids.tolist(), strict=True))
    return [ids[gene] for gene in genes], {gene: ids[gene] for gene in mapping.new}
