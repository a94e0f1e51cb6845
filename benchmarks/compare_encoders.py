"""How well ridge regression on the features of several encoders predicts expression on held-out slides.

python benchmarks/compare_encoders.py DATA --slides C2 C3 C4 C5 --encoders stain-texture hinge-vit-tiny -o runs/encoders

Every slide is held out once; the others choose the panel and, by cross-validation over slides, the ridge penalty.
Features are those of a run: patch and neighbourhood, in units of the slide's own deviation; with --spot-only the
patch alone, as it is. A single slide is divided into its quarters, each of which is held out once.
"""

import argparse
from pathlib import Path

import numpy as np

from hinge.data import read_slide
from hinge.data.features import read_features
from hinge.data.neighbourhood import slide_features
from hinge.data.panel import select_panel
from hinge.data.spots import load_spots
from hinge.encoders import extract_features, load_encoder
from hinge.evaluation.baselines import fit_baselines
from hinge.evaluation.metrics.accuracy import gene_pcc, summarise_pcc
from hinge.utils.files import write_json


def _quarters(slides: dict, features: dict) -> tuple[dict, dict]:
    """Return the quarters of a single slide as slides, and their features."""
    [(name, slide)] = slides.items()
    place = slide.obsm["spatial"] > np.median(slide.obsm["spatial"], axis=0)
    quarter = 2 * place[:, 0] + place[:, 1]
    rows = {f"{name} quarter {number + 1}": np.flatnonzero(quarter == number) for number in range(4)}
    parts = {(encoder, part): found[rows[part]] for (encoder, _), found in features.items() for part in rows}
    quarters = {part: slide[index].copy() for part, index in rows.items()}
    for part, quarter_slide in quarters.items():
        quarter_slide.uns["hinge"]["name"] = part
    return quarters, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--slides", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", help="only these of the slides; default all")
    parser.add_argument("--encoders", nargs="+", required=True)
    parser.add_argument("--patch-um", type=float, default=224.0)
    parser.add_argument("--um-per-px", type=float, help="resolution of the images, where no file contains it")
    parser.add_argument("--genes", type=int, default=200)
    parser.add_argument("--transforms", nargs="+", default=["log2p1", "log1p_cp10k"])
    parser.add_argument("--spot-only", action="store_true")
    parser.add_argument("-o", "--output", required=True, type=Path)
    arguments = parser.parse_args()

    slides = {name: read_slide(arguments.data, name, um_per_px=arguments.um_per_px) for name in arguments.slides}
    features = {}
    for encoder in arguments.encoders:
        loaded = load_encoder(encoder)
        for name, slide in slides.items():
            path = arguments.output / f"{name}.{loaded.digest[:12]}.{arguments.patch_um:g}.h5"
            extract_features(slide, loaded, path, patch_um=arguments.patch_um)
            stored = read_features(path, barcodes=list(slide.obs_names), digest=loaded.digest).features
            context = not arguments.spot_only
            features[encoder, name] = slide_features(stored, slide.obsm["spatial"], context, context)[:, 0]

    if len(slides) == 1:
        slides, features = _quarters(slides, features)
    rows = []
    for held_out in arguments.held_out or slides:
        training = [name for name in slides if name != held_out]
        panel = select_panel([slides[name] for name in training], "hmhvg", arguments.genes)
        for transform in arguments.transforms:
            tables = {name: load_spots(slide, panel, transform) for name, slide in slides.items()}
            places = {name: slides[name].obs_names.get_indexer(tables[name].barcodes) for name in slides}
            for encoder in arguments.encoders:
                inputs = {name: features[encoder, name][places[name]] for name in slides}
                prediction = fit_baselines(
                    np.concatenate([inputs[name] for name in training]),
                    np.concatenate([tables[name].values for name in training]),
                    np.concatenate([np.full(len(places[name]), name) for name in training]),
                    inputs[held_out],
                    ["ridge-cv"],
                )[0].mean
                measured = tables[held_out].values
                scores = summarise_pcc(gene_pcc(measured, prediction), measured.var(axis=0))
                scores["mse"] = float(((measured - prediction) ** 2).mean())
                rows.append({"encoder": encoder, "slide": held_out, "transform": transform, **scores})
    write_json(arguments.output / "scores.json", {"patch_um": arguments.patch_um, "rows": rows})
    for transform in arguments.transforms:
        print(f"\n{transform}, PCC-50 / mean PCC / MSE")
        for encoder in arguments.encoders:
            own = [row for row in rows if row["encoder"] == encoder and row["transform"] == transform]
            cells = [f"{row['slide']} {row['pcc_50']:.3f} {row['pcc_mean']:.3f} {row['mse']:.3f}" for row in own]
            means = [np.mean([row[key] for row in own]) for key in ("pcc_50", "pcc_mean", "mse")]
            print(f"{encoder}: {' | '.join(cells)} | mean {means[0]:.3f} {means[1]:.3f} {means[2]:.3f}")


if __name__ == "__main__":
    main()
