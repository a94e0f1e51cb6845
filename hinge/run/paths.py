"""The folder of a run: where its files lie, and which configuration it belongs to.

config.yaml        the resolved configuration
environment.json   versions and device
panel.json         genes, selected on the training slides
genes.json         which of them are in the vocabulary of given weights
features/          one HDF5 file per slide and encoder (unless features.folder is set)
backbone/          the expression model, where it was pre-trained in this run
split.json         slides and validation spots
training/          log and checkpoints; the store of spots, where training is from disk
model/             the trained HingeModel and its scheduler
samples/           draws, one h5ad a slide
maps/              dense maps of hinge map, h5ad and OME-TIFF
regions/           regions saved from the viewer or QuPath, one GeoJSON a slide, which report and viewer read
baselines/         predictions of the baselines, one npz a slide; models of the generative baselines
scores/            scores of each slide, kept for the next evaluation
model_index.json   panel, encoder and sampling defaults, for `HingePipeline.from_pretrained`
checksums.json     digests of all files but those of the training, see `hinge.utils.checksums`
scores.json, report.html
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hinge.config import RunConfig, load_config, save_config
from hinge.encoders.names import features_file
from hinge.utils import checksums
from hinge.utils.errors import ConfigError, DataError

OUTSIDE_SUFFIX = ".outside-panel"
"""After the name of a slide in the name of the file of draws that hold genes outside the panel."""


class RunPaths:
    """Paths of the files of a run.

    Parameters
    ----------
    config
        Its `output` is the folder of the run.
    opened
        Whether the configuration is the one in the folder, which may come from elsewhere: nothing is then written to a
        folder outside of the run that it names.
    """

    def __init__(self, config: RunConfig, opened: bool = False):
        self._settings, self._opened = config, opened
        self.folder = Path(config.output)
        self.config = self.folder / "config.yaml"
        self.environment = self.folder / "environment.json"
        self.panel = self.folder / "panel.json"
        self.genes = self.folder / "genes.json"
        self.split = self.folder / "split.json"
        self.training = self.folder / "training"
        self.model = self.folder / "model"
        self.scores = self.folder / "scores.json"
        self.report = self.folder / "report.html"
        self.index = self.folder / "model_index.json"

    @property
    def backbone(self) -> Path:
        """The expression model: given weights, or the folder of one that this run trains or initialises."""
        settings = self._settings.backbone
        return self.folder / "backbone" if settings.path is None or settings.weights == "random" else settings.path

    @property
    def has_backbone(self) -> bool:
        """Whether the weights of the backbone are given, or finished in this run."""
        return self.backbone == self._settings.backbone.path or (self.backbone / "config.json").exists()

    @property
    def has_model(self) -> bool:
        """Whether the run is trained."""
        return (self.model / "config.json").exists()

    def require_model(self) -> None:
        """Check that the run is trained.

        Raises
        ------
        DataError
            It is not.
        """
        if not self.has_model:
            raise DataError(f"{self.folder} holds no trained model; run hinge train first")

    def features(self, slide: str) -> Path:
        """The feature file of a slide."""
        settings = self._settings.features
        own = features_file(self.folder / "features", slide, settings.encoder_name)
        if settings.folder is None:
            return own
        given = settings.folder / own.name
        return own if self._opened and not given.exists() else given

    def samples(self, slide: str) -> Path:
        """The draws of a slide."""
        return self.folder / "samples" / f"{slide}.h5ad"

    def regions(self, slide: str) -> Path:
        """The regions of a slide, which the user may put there."""
        return self.folder / "regions" / f"{slide}.geojson"

    def baseline_predictions(self, slide: str) -> Path:
        """The predictions of the baselines for a slide."""
        return self.folder / "baselines" / f"{slide}.npz"

    def kept_scores(self, slide: str) -> Path:
        """Scores of a slide's predictions, kept for the next evaluation."""
        return self.folder / "scores" / f"{slide}.json"

    def baseline(self, method: str) -> Path:
        """The folder of a trained generative baseline."""
        return self.folder / "baselines" / method


def read_run_config(folder: str | Path) -> RunConfig:
    """Return the configuration of the run in a folder, finished or not.

    Raises
    ------
    DataError
        The folder holds no run.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise DataError(
            f"{folder} is not the folder of a run: config.yaml is missing; hinge train --config FILE makes a run"
        )
    config = load_config(folder / "config.yaml", trained=(folder / "model" / "config.json").exists())
    # the folder may have been moved since
    return config.model_copy(update={"output": folder.resolve()})


def claim_folder(config: RunConfig, paths: RunPaths) -> None:
    """Write config.yaml, or check that the one in the folder describes the same run.

    Raises
    ------
    ConfigError
        The folder holds a run with other settings.
    """
    if not paths.config.exists():
        paths.folder.mkdir(parents=True, exist_ok=True)
        checksums.start(paths.folder)
        save_config(config, paths.config)
        return
    # sampling and evaluation may change from call to call; the location of the folder does not matter
    here, there = (
        settings.model_dump(mode="json", exclude={"output", "sampling", "evaluation"})
        for settings in (config, load_config(paths.config, trained=paths.has_model))
    )
    key = _difference(here, there)
    if key is not None:
        raise ConfigError(f"{paths.folder} holds a run with another {key}; choose another output folder")


def _difference(here: dict, there: dict) -> str | None:
    """Return the first key, with dots for sections, at which two configurations differ."""
    for key, value in here.items():
        other = there.get(key)
        if value == other:
            continue
        return f"{key}.{_difference(value, other)}" if isinstance(value, dict) else key
    return None


@contextlib.contextmanager
def undone_on_error(paths: RunPaths) -> Iterator[None]:
    """Remove the files of a run that failed before training started, so that the next try finds an empty folder."""
    files = [paths.config, paths.panel, paths.genes, paths.environment, paths.folder / checksums.NAME]
    written = [file for file in files if not file.exists()]
    try:
        yield
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        for folder in (paths.folder / "features", paths.folder):
            with contextlib.suppress(OSError):  # not there, or not empty: kept
                folder.rmdir()
        raise
