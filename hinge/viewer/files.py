"""The files of the viewer by path, each made on request.

    index.html, viewer.css, *.js, vendor/      the page
    run.json                                   title, slides
    vocabulary.json                            genes that the run can draw outside the panel
    slides/<i>/slide.json                      genes and scores, image, scale, co-expression's genes
    slides/<i>/barcodes.json
    slides/<i>/spots.bin                       float32 x, y of each spot in image pixels
    slides/<i>/genes/<j>.bin                   one gene: measured, mean, deviation, draws; see `SlideContent.gene`
    slides/<i>/novelty.bin                     float32, distance of each spot's features from those of training
    slides/<i>/map/<j>.bin                     float16 (rows, columns), the smooth map of a gene, NaN off the tissue
    slides/<i>/coexpression.bin                int8 matrices, measured and predicted
    slides/<i>/image.dzi, image_files/         deep-zoom tiles
    slides/<i>/labels.json, region…, compare…  regions; see `hinge.viewer.regions`

`hinge view` serves these paths, and `write_viewer` writes each to a file but the tables of regions, which depend on the
request. Files that end in .bin are little-endian and deflated (RFC 1950). No path contains a name from a file.
"""

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

from anndata import AnnData
from tqdm import tqdm

from hinge.data import list_samples
from hinge.data.draws import read_draws
from hinge.data.regions import Region, read_regions
from hinge.run.paths import OUTSIDE_SUFFIX
from hinge.run.run import Run
from hinge.utils.errors import DataError, HingeError
from hinge.utils.files import atomic_path, read_json
from hinge.utils.packages import VERSION
from hinge.viewer.content import SlideContent, json_bytes
from hinge.viewer.maps import SlideMap, find_map

logger = logging.getLogger(__name__)

SLIDES_OPEN = 3  # number of slides whose draws are kept in memory
MOST_DECODED = 1 << 30  # bytes of images without tiles that are kept decoded, beside that of the last tile

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".svg": "image/svg+xml",
    ".dzi": "application/xml; charset=utf-8",
    ".jpeg": "image/jpeg",
    ".bin": "application/octet-stream",
}

_OF_SLIDE = re.compile(r"slides/(\d{1,6})/(.+)", re.ASCII)


class Viewer:
    """All files of the viewer of a run, by path. Safe to use from several threads at once.

    Parameters
    ----------
    run
        A run with draws.
    slides
        Names of the slides to show; None for all that were sampled, the test slides first.

    Raises
    ------
    DataError
        There are no draws of one of the slides, or none at all.
    """

    def __init__(self, run: Run, slides: list[str] | None = None):
        self.run = run
        sampled = sorted(path.stem for path in (run.folder / "samples").glob("*.h5ad"))
        test = [name for name in run.config.data.test if name in sampled]
        self.slides = slides or [*test, *(name for name in sampled if name not in test)]
        for name in self.slides:
            if name not in sampled:
                raise DataError(f"there are no draws of {name} in {run.folder / 'samples'}; run hinge sample first")
        if not self.slides:
            raise DataError(f"there are no draws in {run.folder / 'samples'}; run hinge sample first")
        self._open: OrderedDict[int, SlideContent] = OrderedDict()
        self._lock = threading.Lock()
        self._page = {name: content for name, content in _files(resources.files("hinge.viewer") / "static")}

    def slide(self, number: int) -> SlideContent:
        """Return the content of a slide; the last `SLIDES_OPEN` are kept."""
        with self._lock:
            if number not in self._open:
                path = self.run.paths.samples(self.slides[number])
                logger.info("reading %s", path)
                name = self.slides[number].removesuffix(OUTSIDE_SUFFIX)
                measured, note = self._measured(name)
                draws = read_draws(path)
                saved, warning = self._regions(name, draws)
                smooth, no_map = self._smooth(name, draws)
                content = SlideContent(draws, measured, saved, smooth)
                content.note = " ".join(filter(None, [content.note, note, warning, no_map])) or None
                self._open[number] = content
                if len(self._open) > SLIDES_OPEN:
                    # closed with its last reference: another thread may still be cutting a tile
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]

    def read(self, path: str, query: Mapping[str, str] | None = None) -> bytes | None:
        """Return the file at a path, None if there is none; tables of regions depend on the query.

        Raises
        ------
        HingeError
            The slide's files are missing or damaged.
        """
        if path in self._page:
            return self._page[path]
        if path == "run.json":
            return json_bytes(self.index())
        if path == "vocabulary.json":
            return json_bytes(self._vocabulary())
        match = _OF_SLIDE.fullmatch(path)
        if match is None or int(match[1]) >= len(self.slides):
            return None
        number = int(match[1])
        slide = self.slide(number)
        if match[2].startswith("image_files/"):
            self._release_images(number)
        return slide.read(match[2], query)

    def _release_images(self, shown: int) -> None:
        """Release decoded images of other slides than the one whose tiles are asked for, if they are too large."""
        with self._lock:
            if shown in self._open:
                others = [content.image for number, content in reversed(self._open.items()) if number != shown]
                room = MOST_DECODED - self._open[shown].image.decoded_bytes
                for image in others:
                    room -= image.decoded_bytes
                    if room < 0:
                        image.release()

    def index(self) -> dict[str, Any]:
        """Return the content of `run.json`."""
        return {
            "title": self.run.folder.name,
            "version": VERSION,
            "slides": self.slides,
        }

    def page_paths(self) -> list[str]:
        """Return the paths that do not belong to a slide."""
        return [*self._page, "run.json", "vocabulary.json"]

    def _vocabulary(self) -> dict[str, Any]:
        """Return the genes that `hinge sample --genes` can draw, none for a backbone without expression prior."""
        try:
            # the file is read, not the model: transformers takes seconds to import
            config = read_json(self.run.paths.backbone / "config.json")
        except HingeError:
            config = None
        names = config.get("gene_names") if isinstance(config, dict) and config.get("num_prior_factors") else None
        return {"genes": list(map(str, names)) if isinstance(names, list) else []}

    def _measured(self, name: str) -> tuple[AnnData | None, str | None]:
        data = self.run.config.data
        try:
            if name not in list_samples(data.path, data.format):
                return None, None
            return self.run.slide(name, require_image=False), None
        except HingeError as error:
            logger.warning("%s is shown without measured values: %s", name, error)
            return None, "The measured slide could not be read."

    def _regions(self, name: str, draws: AnnData) -> tuple[dict[str, Region], str | None]:
        path = self.run.paths.regions(name)
        if not path.exists():
            return {}, None
        try:
            return read_regions(path, draws), None
        except HingeError as error:
            logger.warning("%s is shown without its saved regions: %s", name, error)
            return {}, "The saved regions could not be read."

    def _smooth(self, name: str, draws: AnnData) -> tuple[SlideMap | None, str | None]:
        path = find_map(self.run.folder / "maps", name)
        if path is None:
            return None, None
        try:
            return SlideMap(path, draws), None
        except HingeError as error:
            logger.warning("%s is shown without its smooth map: %s", name, error)
            return None, f"The smooth map {path.name} is damaged or does not belong to these draws."


def write_viewer(run: Run, output: str | Path | None = None, slides: list[str] | None = None) -> Path:
    """Write the viewer as a folder that any static web server can serve.

    Parameters
    ----------
    run
        A run with draws.
    output
        The folder, by default `viewer` in the run's folder; an existing viewer is replaced.
    slides
        Names of the slides to show; None for all that were sampled.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    DataError
        There are no draws, or the folder holds something else.
    """
    viewer, output = Viewer(run, slides), Path(output or run.folder / "viewer")
    if output.exists() and not (output / "run.json").is_file() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} exists already and is not a viewer; choose another folder")
    with atomic_path(output) as temporary:
        for path in viewer.page_paths():
            _write(temporary / path, viewer.read(path))
        for number, name in enumerate(viewer.slides):
            content, folder = viewer.slide(number), temporary / "slides" / str(number)
            paths = content.paths()

            def write(path: str, content: SlideContent = content, folder: Path = folder) -> None:
                _write(folder / path, content.read(path))

            write(paths[0])  # computes the cached properties before several threads need them
            with ThreadPoolExecutor(4) as pool:
                # in batches: a map over all paths would continue after an error such as a full disk
                for start in tqdm(range(0, len(paths), 64), desc=name, unit="batch", disable=None):
                    list(pool.map(write, paths[start : start + 64]))
    return output


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _files(folder: Any, prefix: str = "") -> list[tuple[str, bytes]]:
    """Return path and content of the files below a folder of the package."""
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += _files(entry, f"{prefix}{entry.name}/")
        elif Path(entry.name).suffix in CONTENT_TYPES:
            found.append((prefix + entry.name, entry.read_bytes()))
    return found
