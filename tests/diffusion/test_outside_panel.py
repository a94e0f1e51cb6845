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
from hinge.diffusion.inputs import SamplingSettings
from hinge.diffusion.outside_panel import OutsideGenes
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
