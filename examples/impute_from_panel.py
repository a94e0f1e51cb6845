"""Impute the genes of a slide of which only half of the panel was measured.

python examples/impute_from_panel.py RUN SLIDES SAMPLE
"""

import sys

import numpy as np

import hinge


def main(run: str, slides: str, sample: str) -> None:
    pipe = hinge.HingePipeline.from_pretrained(run)
    slide = hinge.read_slide(slides, sample)
    known, unknown = pipe.genes[::2], pipe.genes[1::2]
    measured = slide[:, known].copy()
    # the sum over a panel is not the library size: it has to be given
    measured.obs["total_counts"] = np.asarray(slide.X.sum(axis=1)).ravel()
    imputed = pipe(slide, observed=measured, num_draws=10, seed=0)  # or the path of an h5ad file
    alone = pipe(slide, num_draws=10, seed=0)
    for name, draws in (("image alone", alone), ("image and measured genes", imputed)):
        spread = draws[:, unknown].layers["std"].mean()
        print(f"{name:26} mean standard deviation of the genes that were not measured: {spread:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
