"""The verbs of diffusers on a model, and reading models of version 0.1."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.models import HingeModel
from hinge.models.pretrained import NOT_OFFERED, RENAMED_OPTIONS, RENAMED_TENSORS, WEIGHTS_NAME
from hinge.utils import hub

GENES, FEATURES = 10, 6


def backbone() -> CellFMModel:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_value_bins": 8}
    return CellFMModel(CellFMConfig(num_genes=20, **size)).eval()


def make(**options) -> HingeModel:
    model = HingeModel.from_backbone(backbone(), FEATURES, GENES, **options)
    with torch.no_grad():  # away from the start
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "values": torch.rand(5, GENES) * 4,
        "visible": (torch.rand(5, GENES) > 0.5).float(),
        "timestep": torch.randint(1, 51, (5,)),
        "features": torch.randn(5, FEATURES),
        "gene_ids": torch.arange(3, 3 + GENES),
    }


VARIANTS = [
    {"head": "rounded_gaussian", "transform": "log2p1", "library_size": True},
    {"head": "point", "gene_factors": False, "standardise_features": False},
    {"injection": "cross_attention"},
    {"injection": "concatenation", "modulation_rank": 2},
    {"tuning": "full"},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", VARIANTS)
@torch.no_grad()
def test_a_cast_model_predicts_the_same(options, dtype):
    model, given = make(**options), inputs()
    if options.get("library_size"):
        given["library_size"] = torch.full((5,), 1000.0)
    expected = model(**given).mean
    assert model.to(dtype) is model
    assert model.dtype == model.backbone.dtype == dtype
    # regression, feature statistics and head are not rounded to half precision
    assert model.feature_mean.dtype != torch.bfloat16 and model.feature_mean.dtype != torch.float16
    for name in model._keep_in_fp32_modules:
        for parameter in getattr(model, name).parameters() if getattr(model, name) is not None else ():
            assert parameter.dtype in (torch.float32, torch.float64)
    got = model(**given).mean
    tolerance = 1e-4 if dtype == torch.float64 else 0.05 * float(expected.abs().max()) + 0.02
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=0)


def test_casts_by_name_and_back():
    model = make()
    assert model.half().dtype == torch.float16 and model.bfloat16().dtype == torch.bfloat16
    assert model.float().dtype == torch.float32 == model.backbone.dtype
    assert model.to(device="cpu", dtype=torch.bfloat16).backbone.dtype == torch.bfloat16
    assert model.device.type == "cpu"


def test_gradient_checkpointing_is_switched_by_the_verbs_of_diffusers():
    model, calls = make().train(), []
    assert not model.is_gradient_checkpointing

    def counted(function, *arguments):
        calls.append(function)
        return function(*arguments)

    model.enable_gradient_checkpointing(counted)
    assert model.is_gradient_checkpointing
    plain = model(**inputs()).location
    assert len(calls) == model.config.num_layers
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(model(**inputs()).location, plain)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing and len(calls) == model.config.num_layers
    model(**inputs()).loss(torch.ones(5, GENES)).mean().backward()


def test_sizes():
    model = make()
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.get_memory_footprint() > 0


@pytest.mark.parametrize("verb", NOT_OFFERED)
def test_what_cannot_work_says_so(verb):
    with pytest.raises(NotImplementedError, match=f"{verb} is not offered"):
        getattr(make(), verb)()


def test_save_and_load_take_the_usual_arguments(tmp_path):
    model, frozen = make(), backbone()
    model.save_pretrained(tmp_path / "model", is_main_process=True, safe_serialization=True, max_shard_size="1GB")
    again = HingeModel.from_pretrained(tmp_path / "model", frozen, low_cpu_mem_usage=True, variant=None)
    assert again.digest() == model.digest() and not again.training
    cast = HingeModel.from_pretrained(tmp_path / "model", backbone(), torch_dtype=torch.bfloat16)
    assert cast.dtype == torch.bfloat16 == cast.backbone.dtype
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"safe_serialization": False}, "safetensors only"),
        ({"variant": "fp16"}, "variant"),
        ({"max_shard_size": "1KB"}, "max_shard_size"),
        ({"push_to_hub": True}, "repo_id"),
    ],
)
def test_saving_refuses_what_it_does_not_do(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make().save_pretrained(tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"variant": "fp16"}, {"use_safetensors": False}])
def test_loading_refuses_what_it_does_not_do(options, tmp_path):
    make().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=next(iter(options))):
        HingeModel.from_pretrained(tmp_path / "model", backbone(), **options)


def test_saving_can_push(tmp_path, monkeypatch):
    pushed = {}

    def upload(folder, repository, private=True, message="Upload"):
        pushed[repository] = sorted(path.name for path in folder.iterdir())
        return "address"

    monkeypatch.setattr(hub, "upload", upload)
    make().save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="someone/model")
    assert pushed == {"someone/model": ["config.json", WEIGHTS_NAME]}


def as_version_0_1(folder, **changes):
    """Rewrite a saved model with the names of version 0.1."""
    old_options = {new: old for old, new in RENAMED_OPTIONS.items()}
    config = json.loads((folder / "config.json").read_text())
    config = {old_options.get(name, name): value for name, value in config.items()}
    config |= {"feature_noise": 0.1, "drop_masked": None} | changes
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / WEIGHTS_NAME)
    for old, new in RENAMED_TENSORS.items():
        weights = {
            old + name.removeprefix(new) if name.startswith(new) else name: tensor for name, tensor in weights.items()
        }
    assert any(name.startswith("path.") for name in weights) == config["gene_path"]
    save_file(weights, folder / WEIGHTS_NAME)


@pytest.mark.parametrize("gene_factors", [True, False])
def test_models_of_version_0_1_load_with_one_warning(tmp_path, gene_factors):
    model = make(gene_factors=gene_factors, library_size=True)
    model.save_pretrained(tmp_path / "model")
    as_version_0_1(tmp_path / "model")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = HingeModel.from_pretrained(tmp_path / "model", backbone())
    mine = [str(each.message) for each in caught if "hinge 0.1" in str(each.message)]
    assert len(mine) == 1 and "gene_path is now gene_factors" in mine[0]
    assert again.digest() == model.digest()
    assert again.drops_masked is gene_factors
    again.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        HingeModel.from_pretrained(tmp_path / "again", backbone())


def test_a_value_of_drop_masked_that_differs_from_the_rule_is_kept(tmp_path):
    make().save_pretrained(tmp_path / "model")
    as_version_0_1(tmp_path / "model", drop_masked=False)
    model = HingeModel.from_pretrained(tmp_path / "model", backbone())
    assert not model.drops_masked
    model.save_pretrained(tmp_path / "again")
    assert not HingeModel.from_pretrained(tmp_path / "again", backbone()).drops_masked
