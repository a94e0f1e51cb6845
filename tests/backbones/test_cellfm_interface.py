"""CellFMModel as a `transformers.PreTrainedModel`, and the value space of a backbone."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

import hinge.backbones
from hinge.backbones import CellFMConfig, CellFMModel, load_backbone
from hinge.data.transforms import get_transform
from hinge.utils.errors import ConfigError, WeightsError

GENE_IDS = torch.arange(1, 13)
NONZERO = (torch.arange(24).reshape(2, 12) % 4 > 0).float()
VISIBLE = (torch.arange(12) % 3 > 0).float().expand(2, 12)


@pytest.fixture
def model() -> CellFMModel:
    torch.manual_seed(0)
    return CellFMModel(
        CellFMConfig(
            num_genes=30,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_value_bins=8,
            gene_names=[f"G{number}" for number in range(30)],
        )
    ).eval()


def outputs(model: CellFMModel, nonzero: torch.Tensor | None = NONZERO) -> torch.Tensor:
    values = torch.linspace(0, 3, 24).reshape(2, 12).to(model.dtype)
    return model.decode(model(values, VISIBLE, GENE_IDS, nonzero))


@pytest.mark.parametrize("shard", ["5GB", "5KB"])
def test_save_and_load(model, tmp_path, shard):
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "5KB")
    again = load_backbone(tmp_path)
    assert isinstance(again, PreTrainedModel) and not again.training
    assert again.digest() == model.digest() and again.config.to_dict() == {**model.config.to_dict(), **_written(again)}
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(outputs(again), outputs(model))
    assert CellFMConfig.from_pretrained(tmp_path).gene_names == model.config.gene_names


def _written(model: CellFMModel) -> dict:
    """Fields that saving fills in."""
    return {key: model.config.to_dict()[key] for key in ("architectures", "dtype", "transformers_version")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("nonzero", [NONZERO, None])
def test_types(model, tmp_path, dtype, nonzero):
    expected = outputs(model, nonzero)
    cast = copy.deepcopy(model).to(dtype)
    found = outputs(cast, nonzero)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.15, rtol=0.1)
    cast.save_pretrained(tmp_path)
    assert load_backbone(tmp_path).dtype == dtype
    assert torch.equal(outputs(load_backbone(tmp_path), nonzero), found)
    assert load_backbone(tmp_path, dtype="float32").dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient(model):
    def gradient() -> torch.Tensor:
        model.zero_grad()
        outputs(model.train()).square().sum().backward()
        return model.layers[0].retention.qkvu.weight.grad.clone()

    expected = gradient()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(gradient(), expected)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_embeddings(model):
    assert model.get_input_embeddings() is model.gene_embedding
    with pytest.raises(NotImplementedError, match="add_genes"):
        model.resize_token_embeddings(40)
    model.add_genes({"NEW1": 31, "NEW2": 32}, seed=0)
    assert model.gene_embedding.num_embeddings == 40 and model.config.gene_names[-1] == "NEW2"


def test_push_to_hub(model, monkeypatch):
    uploaded = []

    def upload(folder, repository, private):
        uploaded.append((sorted(path.name for path in folder.iterdir()), repository, private))
        return "https://huggingface.co/someone/backbone"

    monkeypatch.setattr("hinge.utils.hub.upload", upload)
    assert model.push_to_hub("someone/backbone").endswith("someone/backbone")
    assert uploaded == [(["config.json", "model.safetensors"], "someone/backbone", True)]


@pytest.mark.parametrize("transform", ["log1p_cp10k", "log2p1"])
def test_value_space(model, tmp_path, transform):
    counts = torch.tensor([[0.0, 3.0, 7.0], [1.0, 0.0, 0.0]])
    library_size = torch.tensor([200.0, 40.0])
    model.config.transform = transform
    model.save_pretrained(tmp_path)
    model = load_backbone(tmp_path)
    values = model.encode_values(counts, library_size)
    assert torch.equal(values, get_transform(transform).forward(counts, library_size))
    torch.testing.assert_close(model.decode_values(values, library_size), counts)


def test_refused_arguments(model, tmp_path):
    with pytest.raises(ConfigError, match="there is no transform 'sqrt'"):
        CellFMConfig(transform="sqrt")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="dtype must be float32, bfloat16, float16, float64, not 'int4'"):
        load_backbone(tmp_path, dtype="int4")
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        load_backbone(tmp_path / "none")
    with pytest.raises(AttributeError, match="no attribute 'load_cellfm'"):
        hinge.backbones.load_cellfm  # noqa: B018
