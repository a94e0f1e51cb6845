"""What is done with many slides: features, draws and maps.

Each function opens a worker for `hinge.utils.parallel.each_slide`: it loads encoder and model once, and returns the
function that processes the slide of a name and returns the files it wrote.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

WorkOnSlide = Callable[[str], list[Path]]


def open_features(
    data: Path,
    output: Path,
    encoder: str,
    pooling: Any,
    image: Path | None,
    um_per_px: float | None,
    spot_um: float | None,
    allow: Collection[str],
    patch_um: float | None,
    **options: Any,
) -> WorkOnSlide:
    """Return the function that checks a slide of a data set and extracts its features.

    `options` are those of `extract_features`, the others as of `hinge features`.
    """
    from hinge.data.checks import Context, check_slide, stop_on_errors
    from hinge.data.readers import build_slide
    from hinge.encoders import extract_features, load_encoder
    from hinge.encoders.names import features_file

    loaded = load_encoder(encoder, pooling=pooling)
    side = patch_um if patch_um is not None and patch_um > 0 else loaded.patch_um
    context = Context(side / loaded.patch_px)

    def extract(name: str) -> list[Path]:
        slide = build_slide(data, name, image=image, um_per_px=um_per_px, require_counts=False, spot_um=spot_um)
        stop_on_errors(slide, check_slide(slide, context), allow)
        target = features_file(output, name, loaded.name)
        return [extract_features(slide, loaded, target, patch_um=patch_um, **options)]

    return extract


def open_sampling(
    run: Path, image: Path | None, um_per_px: float | None, spot_um: float | None, **options: Any
) -> WorkOnSlide:
    """Return the function that draws the expression of a slide of a run's data set, or of one elsewhere.

    `options` are those of `Run.sample`, the others as of `hinge sample`.
    """
    from hinge.data.draws import draws_files
    from hinge.run.run import Run

    opened = Run.open(run)
    data, pipeline = opened.config.data, opened.pipeline()

    def draw(name: str) -> list[Path]:
        path = Path(name)
        is_path = path.is_file() or (path.is_dir() and name not in [*data.train, *data.test, *data.pretrain])
        if is_path:
            source: dict[str, Any] = {"slide": opened.slide_at(path, um_per_px, image, spot_um=spot_um)}
        elif (image, um_per_px, spot_um) != (None, None, None):
            source = {"slide": opened.slide_at(data.path, um_per_px, image, name, spot_um)}
        else:
            source = {"name": name}
        return draws_files(opened.sample(**source, pipeline=pipeline, **options))

    return draw


def open_maps(
    run: Path,
    output: Path,
    um_per_px: float | None,
    pitch_um: float,
    genes: list[str] | None,
    batch_size: int,
    **options: Any,
) -> WorkOnSlide:
    """Return the function that maps a slide; `options` are those of `open_predictor`, the others as of `hinge map`."""
    from hinge.tasks.dense import map_slide, open_predictor

    predictor = open_predictor(run, **options)

    def map_one(name: str) -> list[Path]:
        return list(map_slide(predictor, predictor.slide(name, um_per_px), output, pitch_um, genes, batch_size))

    return map_one
