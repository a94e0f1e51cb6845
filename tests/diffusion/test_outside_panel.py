"""Genes outside the panel: drawn from the panel's draws by the relation that the backbone learned from counts."""

import numpy as np
import pytest
import torch
from anndata import read_h5ad
from helpers.runs import tiny_settings

from hinge import HingePipeline
from hinge.backbones import CellFMConfig, CellFMModel
from hinge.config import RunConfig
from hinge.data.readers import read_slide
from hinge.data.transforms import get_transform
from hinge.diffusion.inputs import SamplingSettings
from hinge.diffusion.outside_panel import OutsideGenes
from hinge.models.expected_values import CountingVariance
from hinge.run.run import Run
from hinge.utils.errors import ConfigError

GENES, FACTORS, PANEL = 12, 3, 8


def prior_backbone(scale=0.0):
    """A backbone whose network adds `scale` times its prediction to a known factor model."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = CellFMModel(
        CellFMConfig(
            num_genes=GENES,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_value_bins=8,
            gene_names=[f"G{i}" for i in range(GENES)],
            num_prior_factors=FACTORS,
        )
    ).eval()
    mean, loadings, noise = np.full(GENES, 4.0), rng.normal(size=(GENES, FACTORS)), np.full(GENES, 0.2)
    model.set_expression_prior(mean, loadings, noise)
    with torch.no_grad():
        model.correction_scale.fill_(scale)
    return model, mean, loadings @ loadings.T + np.diag(noise)


def outside(model, ids=range(PANEL + 1, GENES + 1), transform="log1p_cp10k"):
    names = [f"G{i - 1}" for i in ids]
    return OutsideGenes(model, torch.arange(1, PANEL + 1), torch.tensor(list(ids)), names, transform)


def test_draws_have_the_conditional_mean_and_covariance_of_the_factor_model():
    model, mean, covariance = prior_backbone()
    rng = np.random.default_rng(1)
    panel = mean[:PANEL] + np.linalg.cholesky(covariance[:PANEL, :PANEL]) @ rng.normal(size=PANEL)
    values = np.tile(panel.astype(np.float32), (4, 1000, 1))
    spots = [f"s{i}" for i in range(1000)]
    settings = SamplingSettings(num_draws=len(values), seed=0, batch_size=500)
    both, of_mean = outside(model).append(values, values.mean(axis=0), spots, settings)
    drawn, expected = both[:, :, values.shape[2] :], of_mean[:, values.shape[2] :]
    weight = np.linalg.solve(covariance[:PANEL, :PANEL], covariance[:PANEL, PANEL:])
    location = mean[PANEL:] + (panel - mean[:PANEL]) @ weight
    left = covariance[PANEL:, PANEL:] - covariance[PANEL:, :PANEL] @ weight
    np.testing.assert_allclose(expected[0], location, atol=1e-3)
    flat = drawn.reshape(-1, GENES - PANEL)
    np.testing.assert_allclose(flat.mean(axis=0), location, atol=0.05)
    np.testing.assert_allclose(np.cov(flat.T), left, atol=0.05)


def test_draws_depend_on_seed_spot_and_draw_alone():
    model, _mean, _ = prior_backbone(scale=1.0)
    values = np.random.default_rng(2).normal(4, 1, size=(3, 5, PANEL)).astype(np.float32)
    names = list("abcde")
    drawn = outside(model).draw(values, names, seed=0, batch_size=5)
    np.testing.assert_allclose(outside(model).draw(values, names, seed=0, batch_size=2), drawn, atol=1e-5)
    part = outside(model).draw(values[:, 2:4], names[2:4], seed=0, batch_size=5)
    np.testing.assert_allclose(part, drawn[:, 2:4], atol=1e-5)
    assert np.abs(outside(model).draw(values, names, seed=1, batch_size=5) - drawn).max() > 0.1
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1
    counts = np.exp2(outside(model, transform="log2p1").draw(values, names, 0, 5)) - 1
    np.testing.assert_allclose(counts, counts.round(), atol=1e-3)


def test_draws_are_counts_of_the_library_size_of_the_panel():
    """Panel draws that are counts give the library size, and the other genes are counts of it; others stay."""
    model, _mean, _ = prior_backbone()
    rng, of_run = np.random.default_rng(3), outside(model)
    sizes = np.array([731.0, 5210.0, 48_000.0])
    counts = rng.poisson(sizes[:, None] * rng.uniform(0.001, 0.01, (1, PANEL)))
    counts[0], counts[1] = 2 * np.arange(PANEL), 6 + np.arange(PANEL)
    values = np.log1p(1e4 * counts / sizes[:, None]).astype(np.float32)
    # even counts alone, of which one is 2, are also counts of half of the library size; above, none is small enough
    assert of_run.library_size(values[0]) == pytest.approx(731 / 2, rel=1e-4)
    assert of_run.library_size(values[1]) is None and of_run.library_size(np.zeros(PANEL, np.float32)) is None
    values[1, 0] = np.log1p(1e4 * 3 / 5210)
    assert of_run.library_size(values[1]) == pytest.approx(5210, rel=1e-4)
    assert of_run.library_size(rng.normal(4, 1, 200).astype(np.float32)) is None
    drawn = of_run.draw(values[None, 1:2], ["s"], seed=0, batch_size=2)[0]
    found = np.expm1(drawn[0].astype(np.float64)) * 5210 / 1e4
    np.testing.assert_allclose(found, found.round(), atol=1e-3)


def test_the_variance_of_counting_is_that_of_the_drawn_spot():
    """With the library size of the pre-training counts, draws of a deep slide are narrower than of a shallow one."""
    model, _mean, _ = prior_backbone()
    model.config.prior_library_size = 1000.0
    model.expression_prior.log_noise.data.fill_(np.log(1.0))
    of_run, spots = outside(model), [f"s{i}" for i in range(3000)]
    counts = np.array([1, 2, 3, 5, 7, 9, 12, 15.0])
    spread = {}
    for size in (800.0, 8000.0):
        values = np.log1p(1e4 * counts * (1 if size < 1000 else 10) / size).astype(np.float32)
        values[0] = np.log1p(1e4 / size)
        drawn = of_run.draw(np.tile(values, (1, len(spots), 1)), spots, seed=0, batch_size=1000)[0]
        spread[size] = drawn.std(axis=0)
        location = of_run.location(values[None], 1)[0]
    # at about 40 counts rounding hardly matters
    left = (of_run.shared**2).sum(axis=1) + of_run.rest
    np.testing.assert_allclose(spread[8000.0] ** 2, left + of_run.counting(location, 8000.0), rtol=0.1)
    assert (spread[8000.0] < 0.9 * spread[800.0]).all()
    assert (of_run.rest < 0.9 * of_run.own).all()
    model.config.prior_library_size = 0.0
    assert outside(model).rest is None


@pytest.mark.parametrize(("transform", "size"), [("log2p1", 1.0), ("log1p_cp10k", 2500.0)])
def test_counting_variance_is_that_of_poisson_counts(transform, size):
    forward, rng = get_transform(transform).forward, np.random.default_rng(0)
    for rate in (0.05, 0.7, 4.0, 60.0, 900.0):
        values = forward(rng.poisson(rate, (100_000, 1)), np.full(100_000, size)).astype(np.float64)
        found = CountingVariance(transform)(values.mean(), size)
        assert found == pytest.approx(values.var(), rel=0.08), rate


@pytest.mark.full
def test_a_run_draws_genes_that_it_was_not_trained_on(tiny_slides, tmp_path, call_cli):
    slides = tiny_slides
    names = list(read_slide(slides, "sim2").var_names)
    vocabulary = tmp_path / "vocabulary.txt"
    vocabulary.write_text("\n".join(names[:30]))
    panel = tmp_path / "panel.txt"
    panel.write_text("\n".join(names[:20]))
    size = ["--hidden-size=16", "--num-hidden-layers=2", "--num-attention-heads=2", "--steps=5"]
    samples = ["--sample=sim10", "--sample=sim11"]
    call_cli("pretrain-expression", slides, *samples, f"--panel={vocabulary}", *size, "-o", tmp_path / "backbone")
    settings = tiny_settings(slides, tmp_path / "run", backbone={"path": str(tmp_path / "backbone")})
    settings["data"]["pretrain"] = []
    settings["panel"] = {"method": "file", "file": str(panel)}
    run = Run(RunConfig.model_validate(settings))
    run.train()
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("\n".join(names[18:25]))
    call_cli("sample", tmp_path / "run", "--slide=sim2", f"--genes={wanted}")
    path = tmp_path / "run" / "samples" / "sim2.outside-panel.h5ad"
    drawn = read_h5ad(path)
    assert list(drawn.var_names) == names[:25]
    assert list(drawn.var_names[~drawn.var["in_panel"]]) == names[20:25]
    plain = read_h5ad(run.sample("sim2"))
    np.testing.assert_array_equal(drawn[:, names[:20]].layers["draw_000"], plain.layers["draw_000"])
    pipe = HingePipeline.from_pretrained(tmp_path / "run")
    same = pipe(read_slide(slides, "sim2"), genes=names[18:25])
    np.testing.assert_array_equal(same.layers["draw_001"], drawn.layers["draw_001"])
    stamp = path.stat().st_mtime_ns
    run.sample("sim2", genes=names[18:25])
    assert path.stat().st_mtime_ns == stamp  # finished draws are kept
    with pytest.raises(ConfigError, match="does not know 1 of 1 genes outside the panel"):
        pipe(read_slide(slides, "sim2"), genes=["no such gene"])
    with pytest.raises(ConfigError, match="all genes of --genes are in the panel"):
        pipe(read_slide(slides, "sim2"), genes=names[:2])
