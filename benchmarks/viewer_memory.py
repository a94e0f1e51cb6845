"""Ask a served viewer for every kind of view, several at once, and print the memory of the server (Linux).

python benchmarks/viewer_memory.py RUN [SLIDE ...]
"""

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hinge.viewer.regions import encode_spots

SHARES = (0.02, 0.3, 0.5, 0.98, 1.0)  # of the spots in a region


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("slide", nargs="*")
    parser.add_argument("--requests", type=int, default=8, help="at once")
    given = parser.parse_args()
    chosen = [argument for name in given.slide for argument in ("--slide", name)]
    command = [sys.executable, "-m", "hinge.cli", "view", given.run, "--no-browser", *chosen]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http\S+", server.stdout.readline())[0]

        def get(path: str) -> bytes:
            with urllib.request.urlopen(address + path, timeout=600) as answer:
                return answer.read()

        def ask(what: str, paths: list[str]) -> None:
            start = time.monotonic()
            with ThreadPoolExecutor(given.requests) as pool:
                list(pool.map(get, paths))
            seconds, status = time.monotonic() - start, Path(f"/proc/{server.pid}/status").read_text()
            peak, now = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 / 1e6 for name in ("VmHWM", "VmRSS"))
            print(
                f"{what:24s} {len(paths):5d} requests {seconds:6.1f} s, peak {peak:6,.0f} MB, now {now:6,.0f} MB",
                flush=True,
            )

        ask("page", ["", "run.json", "vocabulary.json"])
        for number, name in enumerate(json.loads(get("run.json"))["slides"]):
            below = f"slides/{number}/"
            files = ("slide.json", "barcodes.json", "spots.bin", "coexpression.bin", "labels.json", "image.dzi")
            ask(f"{name}: opened", [below + file for file in files])
            for what, paths in views(below, json.loads(get(below + "slide.json"))).items():
                ask(f"{name}: {what}", paths)
    finally:
        server.terminate()
        server.wait()


def views(below: str, slide: dict) -> dict[str, list[str]]:
    """Return the paths of each kind of view of a slide, and of all kinds mixed."""
    rng, n = np.random.default_rng(0), slide["spots"]
    sets = [encode_spots(rng.random(n) < share) for share in SHARES]
    genes = [f"{below}genes/{gene}.bin" for gene in range(len(slide["genes"]))]
    tables = [
        f"{below}{file}spots={spots}{threshold}"
        for spots in sets
        for file in ("region.json?", "region.csv?")
        for threshold in ("", "&threshold=1")
    ]
    comparisons = [
        f"{below}compare.{kind}?first={first}&second={second}&threshold=0.5"
        for kind in ("json", "csv")
        for first in sets
        for second in sets
        if first != second
    ]
    cut = tiles(below, slide["image"])
    mixed = [*tables, *comparisons, *cut[-40:], *genes[::4], *[f"{below}coexpression.bin"] * 5]
    rng.shuffle(mixed)
    return {"genes": genes * 2, "tiles": cut, "regions": tables, "comparisons": comparisons, "mixed": mixed}


def tiles(below: str, image: dict) -> list[str]:
    """Return the paths of all deep-zoom tiles of an image, coarsest level first."""
    last = int(np.ceil(np.log2(max(image["width"], image["height"]))))
    paths = []
    for level in range(last + 1):
        width, height = (-(-image[side] // 2 ** (last - level)) for side in ("width", "height"))
        columns, rows = -(-width // image["tile"]), -(-height // image["tile"])
        paths += [f"{below}image_files/{level}/{x}_{y}.jpeg" for x in range(columns) for y in range(rows)]
    return paths


if __name__ == "__main__":
    main()
