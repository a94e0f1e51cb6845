"""The command that checks slides."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hinge.cli.options import Allow, DataSet, SpotSide, existing, open_folder
from hinge.cli.verifying import check_run
from hinge.utils.errors import ConfigError, DataError


def check(
    data: DataSet,
    sample: Annotated[list[str] | None, typer.Option(help="Sample of the data set; repeat for several.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image, where the slide does not name it.")] = None,
    um_per_px: Annotated[float | None, typer.Option(help="Resolution, where the slide does not say.")] = None,
    panel: Annotated[Path | None, typer.Option(help="Genes that the slides need: panel.json or a list.")] = None,
    target_um_per_px: Annotated[
        float | None, typer.Option(help="Resolution of the encoder's patches.  [default: 0.5]", min=0.01)
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a trained run: compare the slides with its training slides. It keeps their features.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write summaries and findings to this file.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with the spots on the image.")] = None,
    spot_um: SpotSide = None,
    allow: Allow = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="A run: accept its files as they are, after an intended change.")
    ] = False,
) -> None:
    """Check slides before anything is computed: one line a slide, and what is wrong with it or may be.

    Exit code 2 if there are errors. Each code has a section in the reference, on the page Findings. For the folder of a
    run, its files are compared with their checksums.

    Example: hinge check her2st --sample C5 --html check.html, or: hinge check biopsy.svs --run runs/her2st
    """
    existing(data)
    if (data / "config.yaml").is_file():
        if run is not None:
            raise ConfigError(f"--run compares slides with a run, and {data} is the folder of a run: name a data set")
        check_run(data, accept)
        return
    if accept:
        raise ConfigError(f"--accept is for the folder of a run, and {data} is none")
    if run is not None and (panel is not None or target_um_per_px is not None):
        raise ConfigError("--run sets the panel and the resolution: leave out --panel and --target-um-per-px")
    opened = None if run is None else open_folder(run, trained=True)
    from hinge.data.checks import Context, check_slide, require_codes, unreadable
    from hinge.data.checks.summary import as_json, line_of, page_of, picture, summarise
    from hinge.data.panel import read_panel
    from hinge.data.readers import build_slide, require_samples
    from hinge.utils.files import atomic_path, write_json

    require_codes(allow or [])
    names = require_samples(data, sample)
    if not names:
        raise DataError(f"{data} has no slides")
    if image is not None and len(names) > 1:
        raise ConfigError("--image is the image of one slide; name it with --sample")
    context = Context(target_um_per_px or 0.5, read_panel(panel).genes if panel else ())
    slides: list[tuple[dict[str, Any], list, bytes | None]] = []
    errors = 0
    for name in names:
        summary: dict[str, Any] = {"slide": name}
        drawn = None
        try:
            if opened is None:
                slide = _build(build_slide, data, name, image, um_per_px, spot_um)
            else:
                slide = opened.slide_at(data, um_per_px, image, name, spot_um)
        except DataError as error:
            findings = [unreadable(error)]
            print(f"{name}: no slide")
        else:
            novelty = None
            if opened is None:
                findings = check_slide(slide, context)
            else:
                findings, novelty = opened.check(slide, allow or [])
            summary = summarise(slide, novelty)
            drawn = picture(slide) if html is not None else None
            print(line_of(summary))
        for finding in findings:
            allowed = finding.code in (allow or [])
            errors += finding.level == "error" and not allowed
            print(f"  {finding.level}{' (allowed)' if allowed else ''}: {finding}")
        slides.append((summary, findings, drawn))
    if json is not None:
        write_json(json, {"slides": [as_json(summary, findings) for summary, findings, _ in slides]})
    if html is not None:
        with atomic_path(html) as temporary:
            temporary.write_text(page_of(slides), encoding="utf-8")
    if errors:
        raise typer.Exit(2)


def _build(build, path: Path, name: str, image: Path | None, um_per_px: float | None, spot_um: float | None):
    """Return a slide; without its image where it has none, which only some commands need."""
    from hinge.data.readers import recognise_format

    try:
        return build(path, name, image=image, um_per_px=um_per_px, require_counts=False, spot_um=spot_um)
    except DataError as error:
        if image is not None or "image" not in str(error) or recognise_format(path) == "image":
            raise
        try:
            slide = build(path, name, um_per_px=um_per_px, require_image=False, require_counts=False, spot_um=spot_um)
        except DataError:
            raise error from None
        if slide.uns["hinge"].get("image_path"):
            raise
        return slide
