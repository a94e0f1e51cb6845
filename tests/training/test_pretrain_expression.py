"""Pre-training of an expression backbone: it learns, resumes, and validates with masks of each spot's own."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.training import killed_at

import hinge.training.expression as expression
from hinge.backbones import CellFMConfig, CellFMModel
from hinge.backbones.loading import MODELS, new_config
from hinge.data.count_table import CountTable
from hinge.evaluation.masked_genes import conditional_mean, draw_masks, lost_to, masked_gene_table
from hinge.training import PretrainConfig, pretrain_expression
from hinge.training.count_augmentation import CountAugmentation
from hinge.training.expression import backbone_predictor, split_patients
from hinge.training.expression_prior import fit_expression_prior
from hinge.utils.errors import ConfigError, DataError


def counts(n=120, genes=12, seed=0, samples=4):
    """Counts of spots with three factors, in samples that differ in all genes."""
    rng = np.random.default_rng(seed)
    sample = np.arange(n) * samples // n
    log_rate = (
        rng.normal(size=(n, 3)) @ rng.normal(size=(3, genes)) + 2 + 0.5 * rng.normal(size=(samples, genes))[sample]
    )
    drawn = rng.poisson(np.exp(np.minimum(log_rate, 6))).astype(np.float32)
    names = np.array([f"P{number}" for number in sample])
    return CountTable(drawn, drawn.sum(axis=1) + 50, names, names, [f"G{i}" for i in range(genes)])


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_value_bins": 8}


def tiny(architecture: str, **options):
    """Return the configuration of a tiny backbone without genes."""
    return new_config(architecture, "log1p_cp10k", 16, 2, 2, **options)


@pytest.mark.full
@pytest.mark.parametrize(
    ("architecture", "prior"),
    [("cellfm", True), ("cellfm", False), ("scgpt", False), ("tahoe", False)],
)
def test_pretraining_learns_and_resumes_to_the_same_weights(tmp_path, monkeypatch, architecture, prior):
    table = counts()
    config = PretrainConfig(steps=100, batch_size=32, learning_rate=3e-3, evaluate_every=10, expression_prior=prior)
    whole = pretrain_expression(table, tiny(architecture), config, tmp_path / "whole")
    log = [json.loads(line) for line in (tmp_path / "whole-training" / "log.jsonl").read_text().splitlines()]
    scores = [record["validation_loss"] for record in log if "validation_loss" in record]
    # these counts have no more structure than the prior describes
    assert prior or min(scores) < 0.9 * scores[0]

    with killed_at(monkeypatch, 20):
        pretrain_expression(table, tiny(architecture), config, tmp_path / "parts")
    parts = pretrain_expression(table, tiny(architecture), config, tmp_path / "parts")
    assert parts.digest() == whole.digest()
    # a finished folder is loaded, not trained again
    assert pretrain_expression(table, tiny(architecture), config, tmp_path / "whole").digest() == whole.digest()


@pytest.mark.parametrize("architecture", ["cellfm", "tahoe"])
def test_genes_a_file_lacks_are_never_targets(tmp_path, architecture):
    table = counts()
    table.counts[:60, 3] = np.nan
    config = PretrainConfig(steps=3, batch_size=16, expression_prior=architecture == "cellfm")
    model = pretrain_expression(table, tiny(architecture), config, tmp_path / "b")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["generative", "full"])
def test_ranks_are_those_among_all_genes(tmp_path, attention):
    """A step that sees five of the genes gives the model their bins among all twelve, as a run does."""
    table, seen = counts(), []
    config = tiny("scgpt", attention=attention)
    config.set_genes(table.genes)
    model = MODELS["scgpt"](config)
    settings = PretrainConfig(genes_per_step=5, expression_prior=False)
    rows = expression._MaskedRows(table, np.arange(100), np.arange(100, 120), model, settings, 0, torch.device("cpu"))

    def module(values, visible, gene_ids):
        seen.append((values, gene_ids))
        return torch.zeros_like(values)

    generator = torch.Generator().manual_seed(0)
    for half in rows.batch_loss(module, 0, np.arange(8), np.arange(8), generator):
        half()
    rows.evaluate(module, np.arange(8))
    values, ids = seen[2]
    of_all = model.encode_values(torch.from_numpy(table.counts[100:108]), torch.ones(8))
    assert torch.equal(values, of_all[:, ids - 1]) and len(ids) == 5
    # without genes outside the step the highest of them would have the last bin in every spot
    assert (values.amax(dim=1) < 50).any() and seen[0][0].shape == seen[1][0].shape == (4, 5)
    # every weight that is trained is used
    task = expression._MaskedReconstruction(model)
    task(values, (torch.rand(8, 5) < 0.5).float(), ids).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None and bool(parameter.grad.any())), name


def test_pretraining_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(DataError, match="at least 10 spots"):
        pretrain_expression(counts(5, samples=1), CellFMConfig(**TINY), PretrainConfig(steps=1), tmp_path / "a")
    table = counts()
    pretrain_expression(table, CellFMConfig(**TINY), PretrainConfig(steps=1), tmp_path / "a")
    with pytest.raises(ConfigError, match="holds a cellfm, not a scgpt"):
        pretrain_expression(table, tiny("scgpt"), PretrainConfig(steps=1, expression_prior=False), tmp_path / "a")
    with pytest.raises(ConfigError, match="has no expression prior"):
        pretrain_expression(table, tiny("tahoe"), PretrainConfig(steps=1), tmp_path / "b")
    with pytest.raises(ConfigError, match="has no attention"):
        tiny("cellfm", attention="full")
    with pytest.raises(ConfigError, match="other genes"):
        turned = replace(table, genes=table.genes[::-1])
        pretrain_expression(turned, CellFMConfig(**TINY), PretrainConfig(steps=1), tmp_path / "a")


def test_whole_patients_are_held_out():
    table = counts(samples=6)
    patient = np.array([{"P0": "a", "P1": "a", "P2": "b", "P3": "b"}.get(name, "c") for name in table.sample])
    for changed, names in (
        (replace(table, patient=patient), patient),
        (replace(table, patient=np.full(len(table), "a")), table.sample),
    ):
        training, held = split_patients(changed, seed=1)
        assert sorted([*training, *held]) == list(range(len(table)))
        assert not set(names[training]) & set(names[held]) and 0 < len(held) < len(table) / 2
    alone = replace(table, patient=np.full(len(table), "a"), sample=np.full(len(table), "s"))
    assert len(split_patients(alone, seed=1)[1]) == 12


def test_the_expression_prior_is_the_conditional_mean(tmp_path):
    """Before the network is trained, a backbone predicts what the factor model of its counts does."""
    table = counts(200)
    values = table.values("log1p_cp10k")
    mean, loadings, noise = fit_expression_prior(values, table.patient, "log1p_cp10k", 0)
    model = CellFMModel(CellFMConfig(num_genes=12, num_prior_factors=loadings.shape[1], **TINY))
    assert loadings.shape[1] == 6 + 4  # half as many factors as genes, and one for each patient
    model.set_expression_prior(mean, loadings, noise)
    with torch.no_grad():
        model.correction_scale.zero_()
    masked = draw_masks(*values.shape, 0.5, seed=0)
    expected = conditional_mean(mean, loadings @ loadings.T + np.diag(noise))(values, ~masked)
    found = backbone_predictor(model, np.arange(1, 13))(values, ~masked)
    np.testing.assert_allclose(found[masked], expected[masked], atol=2e-4)
    # ids of each row's own, as in sampling
    ids = torch.arange(1, 13).expand(5, -1)
    rows = torch.from_numpy(values[:5]), torch.from_numpy(~masked[:5]).float()
    torch.testing.assert_close(model.expected(*rows, ids), model.expected(*rows, ids[0]), atol=1e-5, rtol=1e-5)
    # a gene that the pre-training never saw does not change the others
    model.add_genes({"new": 13}, seed=0)
    more = [torch.cat([each, torch.ones(5, 1)], dim=1) for each in rows]
    found = model.expected(*more, torch.arange(1, 14))
    torch.testing.assert_close(found[:, :12], model.expected(*rows, ids[0]), atol=1e-5, rtol=1e-5)


def test_the_prior_is_fitted_to_all_patients_in_the_end(tmp_path, monkeypatch):
    """The saved prior is that of all rows, the network that of the training rows, and the report does without them."""
    table, reported = counts(samples=6), []
    monkeypatch.setattr(expression, "_report", lambda model, *rest: reported.append(model))
    model = pretrain_expression(table, CellFMConfig(**TINY), PretrainConfig(steps=5, batch_size=16), tmp_path / "b")
    loaded, prior = CellFMModel.from_pretrained(tmp_path / "b"), model.expression_prior
    assert loaded.digest() == model.digest() and not model.training
    values = table.values("log1p_cp10k")
    fitted = fit_expression_prior(values, table.patient, "log1p_cp10k", 0)
    mean, loadings, noise = (torch.from_numpy(part).float() for part in fitted)
    genes = slice(1, len(table.genes) + 1)
    torch.testing.assert_close(prior.mean[genes], mean)
    torch.testing.assert_close(prior.loadings[genes] @ prior.loadings[genes].T, loadings @ loadings.T)
    torch.testing.assert_close(prior.log_noise[genes].exp(), noise)
    held = split_patients(table, 0)[1]
    assert len(held) and reported[0].config.num_prior_factors == model.config.num_prior_factors - 1
    trained = dict(reported[0].named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("expression_prior"):
            assert torch.equal(parameter, trained[name]), name


def test_the_report_compares_the_backbone_with_linear_models(tmp_path, caplog):
    """A backbone without training and prior loses to the linear model, and the log says so."""
    table = counts(400, samples=8)
    config = PretrainConfig(steps=1, batch_size=16, expression_prior=False)
    with caplog.at_level("WARNING"):
        pretrain_expression(table, CellFMConfig(**TINY), config, tmp_path / "bad")
    assert "worse than a linear-Gaussian model" in caplog.text
    rows = json.loads((tmp_path / "bad-training" / "masked_genes.json").read_text())["rows"]
    assert {row["masked"] for row in rows} == {0.2, 0.5, 0.9} and lost_to(rows)
    caplog.clear()
    with caplog.at_level("WARNING"):
        pretrain_expression(table, CellFMConfig(**TINY), PretrainConfig(steps=1, batch_size=16), tmp_path / "good")
    good = json.loads((tmp_path / "good-training" / "masked_genes.json").read_text())["rows"]
    assert np.mean([a["backbone"] / b["backbone"] for a, b in zip(good, rows, strict=True)]) < 0.7
    # the linear models of both reports are the same
    assert [row["ledoit_wolf"] for row in good] == [row["ledoit_wolf"] for row in rows]


def test_linear_models_recover_masked_values():
    """On data of a Gaussian, the conditional mean of its own covariance has the error that theory gives."""
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(10, 2))
    covariance = loadings @ loadings.T + 0.1 * np.eye(10)
    values = rng.multivariate_normal(np.ones(10), covariance, 4000).astype(np.float32)
    visible = np.zeros((4000, 10), dtype=bool)
    visible[:, :6] = True
    found = conditional_mean(np.ones(10), covariance)(values, visible)
    left = covariance[6:, 6:] - covariance[6:, :6] @ np.linalg.solve(covariance[:6, :6], covariance[:6, 6:])
    np.testing.assert_allclose(((found - values)[:, 6:] ** 2).mean(axis=0), np.diag(left), rtol=0.1)
    rows = masked_gene_table(lambda x, seen: np.ones_like(x), values[:2000], {"s": values[2000:]})
    assert all(row["ledoit_wolf"] < 0.5 * row["backbone"] for row in rows if row["masked"] < 0.9)
    assert all(abs(row["factors"] / row["ledoit_wolf"] - 1) < 0.1 for row in rows)


def test_counts_are_pooled_and_thinned():
    table = counts(160, samples=2)
    rows, genes = np.arange(160), torch.arange(12)
    sizes = torch.from_numpy(table.library_size)
    augment = CountAugmentation(torch.from_numpy(table.counts), sizes, table.sample, rows)
    with torch.autocast("cpu", torch.bfloat16):  # as in training; counts stay exact
        found, library = augment(rows, genes, torch.Generator().manual_seed(0))
    assert found.dtype == torch.float32 and torch.equal(found, found.round())
    same = (found == torch.from_numpy(table.counts)).all(dim=1)
    # as often as neither happens
    assert abs(float(same.float().mean()) - 0.6 * 0.5) < 0.15
    assert (library > 1.5 * sizes).any() and (library < 0.7 * sizes).any()
    # counts keep their share of the library size
    share = lambda counts, sizes: float((counts.sum(dim=1) / sizes).mean())  # noqa: E731
    assert abs(share(found, library) / share(torch.from_numpy(table.counts), sizes) - 1) < 0.1
    # spots are pooled within their sample only
    assert all(set(table.sample[augment.similar[row]]) == {table.sample[row]} for row in rows)


@pytest.mark.parametrize(("architecture", "genes_per_step"), [("cellfm", 2048), ("cellfm", 5), ("scgpt", 5)])
def test_validation_does_not_depend_on_how_rows_are_split(architecture, genes_per_step):
    """Several processes and other batches score the same masks."""
    torch.manual_seed(0)
    config = tiny(architecture)
    config.set_genes([f"G{number}" for number in range(12)])
    model = MODELS[architecture](config).eval()
    table, task, rows = counts(samples=10), expression._MaskedReconstruction(model), np.arange(12)
    totals = []
    for batch_size, parts in ((16, 1), (16, 2), (5, 1)):
        config = PretrainConfig(batch_size=batch_size, genes_per_step=genes_per_step)
        data = expression._MaskedRows(table, *split_patients(table, 3), model, config, 3, torch.device("cpu"))
        with torch.no_grad():
            totals.append(sum(data.evaluate(task, part) for part in np.array_split(rows, parts)))
    assert totals[0][1] == len(rows) == len(data.held)
    torch.testing.assert_close(totals[1], totals[0])
    torch.testing.assert_close(totals[2], totals[0])


def test_a_section_shows_only_what_a_user_sets():
    keys = {
        "steps",
        "batch_size",
        "learning_rate",
        "precision",
        "genes_per_step",
        "expression_prior",
        "evaluate_every",
    }
    assert set(PretrainConfig.model_fields) == keys
    assert all(field.description for field in PretrainConfig.model_fields.values())
    loop_config = PretrainConfig(steps=7, precision="bf16").loop()
    assert (loop_config.steps, loop_config.precision, loop_config.warmup_steps) == (7, "bf16", 100)
    with pytest.raises(ValueError, match="fp16 is not offered"):
        PretrainConfig(precision="fp16")
