"""Questions that only draws answer: probabilities, intervals, co-expression with its uncertainty.

python examples/uncertainty.py DRAWS.h5ad
"""

import sys

import anndata
import numpy as np


def main(path: str) -> None:
    draws = anndata.read_h5ad(path)
    values = np.stack(
        [draws.layers[name] for name in draws.layers if name and name.startswith("draw_")]
    )  # draws, spots, genes
    variable = np.argsort(values.mean(axis=0).std(axis=0))[::-1]
    first, second = (draws.var_names[i] for i in variable[:2])

    one = values[:, :, variable[0]]
    threshold = np.median(one)
    probability = (one > threshold).mean(axis=0)
    print(f"{first}: {np.sum(probability > 0.9)} of {draws.n_obs} spots are above {threshold:.2f} with P > 0.9")

    low, high = np.quantile(one, [0.05, 0.95], axis=0)
    print(f"{first}: mean width of the 90 % interval {np.mean(high - low):.2f} {draws.uns['hinge']['transform']}")

    correlations = [np.corrcoef(draw[:, variable[:2]].T)[0, 1] for draw in values]
    print(f"{first} and {second}: correlation over spots {np.mean(correlations):.2f} ± {np.std(correlations):.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
