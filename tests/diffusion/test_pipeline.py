"""The pipeline: loaded from a run or a saved folder, called on a slide, and diffusers' verbs."""

import json
import shutil

import anndata as ad
import numpy as np
import pytest
import torch

import hinge
from hinge.backbones import CellFMConfig, CellFMModel
from hinge.data.draws import read_draws
from hinge.diffusion import HingePipeline, MaskedDiffusionScheduler
from hinge.models import HingeModel
from hinge.utils import checksums
from hinge.utils.errors import ConfigError, DataError, WeightsError


@pytest.fixture(scope="module")
def pipe(tiny_run):
    return HingePipeline.from_pretrained(tiny_run.folder)


@pytest.fixture(scope="module")
def slide(tiny_run):
    return tiny_run.slide("sim2")


def assert_equal_draws(one: ad.AnnData, two: ad.AnnData) -> None:
    """The same bytes: values, names, places and provenance."""
    np.testing.assert_array_equal(one.X, two.X)
    assert sorted(one.layers) == sorted(two.layers)  # a file sorts them
    for name in one.layers:
        np.testing.assert_array_equal(one.layers[name], two.layers[name])
    assert list(one.obs_names) == list(two.obs_names) and list(one.var_names) == list(two.var_names)
    np.testing.assert_array_equal(one.obsm["spatial"], two.obsm["spatial"])
    facts = [draws.uns["hinge"] for draws in (one, two)]
    assert facts[0].keys() == facts[1].keys()
    for key, value in facts[0].items():
        np.testing.assert_array_equal(value, facts[1][key], err_msg=key)


@pytest.mark.parametrize("with_index", [True, False])
def test_the_draws_are_those_of_hinge_sample(tiny_run, slide, tmp_path, with_index):
    """The example in Python named spots in another way and passed no positions: its draws were others."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.folder, folder)
    if not with_index:  # the run of an earlier version
        (folder / "model_index.json").unlink()
    loaded = HingePipeline.from_pretrained(folder)
    sampled = read_draws(tiny_run.sample("sim2", output=tmp_path / "sampled.h5ad", draws=4, seed=3))
    assert_equal_draws(loaded(slide, num_draws=4, seed=3), sampled)
    # with features that were extracted before
    features = tiny_run.features(slide)
    assert_equal_draws(loaded(slide, num_draws=4, seed=3, features=features), sampled)
    stored = hinge.read_features(features).features
    again = loaded(slide, num_draws=4, seed=3, features=stored[:, 0])
    np.testing.assert_array_equal(again.layers["draw_003"], sampled.layers["draw_003"])


def test_measured_genes_as_a_file_or_in_memory(tiny_run, pipe, slide, tmp_path):
    genes = pipe.settings.genes[:7]
    counts = slide[:20, genes].copy()
    counts.obs["total_counts"] = np.asarray(slide.X.sum(axis=1)).ravel()[:20]
    counts.write_h5ad(tmp_path / "panel.h5ad")
    sampled = read_draws(tiny_run.sample("sim2", output=tmp_path / "s.h5ad", observed=tmp_path / "panel.h5ad"))
    assert_equal_draws(pipe(slide, observed=tmp_path / "panel.h5ad"), sampled)
    drawn = pipe(slide, observed=counts)
    np.testing.assert_array_equal(drawn.X, sampled.X)
    assert len(drawn.uns["hinge"]["observed"]) == 64


def test_saved_and_loaded_without_the_run(pipe, slide, tiny_run, tmp_path, monkeypatch):
    """`from_pretrained` raised on what `save_pretrained` wrote, and the backbone was not part of it."""
    expected = pipe(slide, num_draws=2)
    pipe.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "backbone",
        "model",
        "model_index.json",
        "scheduler",
    ]
    again = HingePipeline.from_pretrained(tmp_path / "saved")
    assert_equal_draws(again(slide, num_draws=2), expected)
    # another time, from a cast pipeline, over the first
    again.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert_equal_draws(HingePipeline.from_pretrained(tmp_path / "saved")(slide, num_draws=2), expected)
    # as a repository of the hub
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **named: str(tmp_path / "saved"))
    assert_equal_draws(HingePipeline.from_pretrained("somebody/else")(slide, num_draws=2), expected)


def test_verbs_of_diffusers(tiny_run, slide):
    pipe = HingePipeline.from_pretrained(tiny_run.folder)
    assert pipe.device == torch.device("cpu") and pipe.dtype == torch.float32
    assert pipe.components == {"model": pipe.model, "scheduler": pipe.scheduler}
    full = pipe(slide, num_draws=2)
    assert pipe.to("cpu") is pipe and pipe.to(torch.device("cpu"), torch.bfloat16) is pipe
    assert pipe.dtype == torch.bfloat16
    half = pipe(slide, num_draws=2)
    assert half.uns["hinge"]["precision"] == "bf16" and full.uns["hinge"]["precision"] == "no"
    assert half.uns["hinge"]["model_digest"] == full.uns["hinge"]["model_digest"]
    assert np.corrcoef(half.X.ravel(), full.X.ravel())[0, 1] > 0.99
    assert pipe.to(torch.float32).dtype == torch.float32
    assert HingePipeline.from_pretrained(tiny_run.folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"not in torch\.float16"):
        pipe.to(torch.float16)
    pipe.set_progress_bar_config(disable=True)
    assert "HingePipeline" in repr(pipe)
    for verb in (
        "enable_model_cpu_offload",
        "enable_sequential_cpu_offload",
        "enable_group_offload",
        "enable_attention_slicing",
        "enable_xformers_memory_efficient_attention",
        "enable_freeu",
        "fuse_qkv_projections",
    ):
        with pytest.raises(NotImplementedError, match=f"HingePipeline has no {verb}: "):
            getattr(pipe, verb)("anything")
    for verb in (pipe.download, HingePipeline.download, HingePipeline.from_pipe):
        with pytest.raises(NotImplementedError, match="HingePipeline has no "):
            verb("anything")


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_a_tuned_backbone_is_saved_as_it_was(tuning, tmp_path):
    torch.manual_seed(0)
    config = CellFMConfig(num_genes=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_value_bins=4)
    CellFMModel(config).save_pretrained(tmp_path / "backbone")
    model = HingeModel.from_backbone(CellFMModel.from_pretrained(tmp_path / "backbone"), 3, 8, tuning=tuning).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    scheduler = MaskedDiffusionScheduler(10)
    scheduler.save_pretrained(tmp_path / "scheduler")
    settings = {
        "genes": [f"g{i}" for i in range(8)],
        "gene_ids": list(range(1, 9)),
        "transform": "log2p1",
        "encoder": "stain-texture",
        "sampling": {},
        "backbone": {},
    }
    (tmp_path / "model_index.json").write_text(json.dumps({"settings": settings}))
    first = HingePipeline.from_pretrained(tmp_path)
    first.save_pretrained(tmp_path / "saved")
    again = HingePipeline.from_pretrained(tmp_path / "saved")
    assert again.model_digest == first.model_digest == model.digest()
    if tuning == "frozen":  # one that was made in memory
        HingePipeline(model, scheduler, settings).save_pretrained(tmp_path / "made")
        assert HingePipeline.from_pretrained(tmp_path / "made").model_digest == model.digest()
    else:
        with pytest.raises(WeightsError, match="no longer the one the model was made for"):
            HingePipeline(model, scheduler, settings).save_pretrained(tmp_path / "made")
        assert not (tmp_path / "made").exists()
        with pytest.raises(WeightsError, match="rounded to bfloat16"):
            first.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")


def test_mistakes_are_reported(tiny_run, pipe, slide, tmp_path):
    with pytest.raises(DataError, match="folder of no run and no pipeline"):
        HingePipeline.from_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text("output: .\n")
    with pytest.raises(DataError, match="holds no trained model"):
        HingePipeline.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="knows no panel"):
        HingePipeline(pipe.model, pipe.scheduler)(slide)
    with pytest.raises(ConfigError, match="99 steps cannot be taken"):
        pipe(slide, num_inference_steps=99)
    with pytest.raises(DataError, match="one row a spot of slide sim2"):
        pipe(slide, features=np.zeros((3, 4)))
    with pytest.raises(DataError, match="the model takes"):
        pipe(slide, features=np.zeros((slide.n_obs, 4)))
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["settings"]["encoder_digest"] = "0" * 64
    (folder / "model_index.json").write_text(json.dumps(index))
    checksums.accept(folder)
    with pytest.raises(WeightsError, match="has other weights than the model was trained with"):
        HingePipeline.from_pretrained(folder)(slide)
    index["settings"]["gene_ids"] = [1]
    (folder / "model_index.json").write_text(json.dumps(index))
    checksums.accept(folder)
    with pytest.raises(DataError, match="describes no pipeline: 20 genes have 1 ids"):
        HingePipeline.from_pretrained(folder)


def test_the_run_may_change_how_it_samples(tiny_run, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.folder, folder)
    text = (folder / "config.yaml").read_text()
    assert "  draws: 3\n" in text and "sampling:\n" in text
    (folder / "config.yaml").write_text(
        text.replace("  draws: 3\n", "  draws: 5\n").replace("sampling:\n", "sampling:\n  order: confidence\n")
    )
    checksums.accept(folder)
    assert HingePipeline.from_pretrained(folder).settings.sampling.num_draws == 5
    assert "sampling.order confidence of this run is no longer supported" in caplog.text
