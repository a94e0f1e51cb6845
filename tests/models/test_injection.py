"""Every way in which condition and backbone can meet: at the start, in training, saved and loaded, in sampling."""

import itertools

import pytest
import torch
from helpers.draws import draw_features

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.models import HingeModel
from hinge.models.tuning import cast_frozen
from hinge.utils.errors import WeightsError

GENES, FEATURES = 10, 6
IDS = torch.arange(3, 3 + GENES)

OPTIONS = {
    "soft": {},
    "no norm": {"norm": "none"},
    "layer norm": {"norm": "layer"},
    "random start": {"start": "random"},
    "random start, low rank": {"start": "random", "modulation_rank": 2},
    "adaln-zero": {"injection": "adaln_zero"},
    "adaln-zero, low rank": {"injection": "adaln_zero", "modulation_rank": 2},
    "concatenation": {"injection": "concatenation"},
    "cross-attention": {"injection": "cross_attention"},
    "full": {"tuning": "full"},
    "lora": {"tuning": "lora", "lora_rank": 2},
    "lora, cross-attention": {"tuning": "lora", "injection": "cross_attention"},
}


def backbone(seed=0, masked_input="mask_token") -> CellFMModel:
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_value_bins": 8}
    return CellFMModel(CellFMConfig(num_genes=20, masked_input=masked_input, **size)).eval()


def make(options: dict, **more) -> HingeModel:
    return HingeModel.from_backbone(backbone(), FEATURES, GENES, **options, **more)


def inputs(batch=5) -> dict:
    torch.manual_seed(1)
    return {
        "values": torch.rand(batch, GENES) * 4,
        "visible": (torch.rand(batch, GENES) > 0.5).float(),
        "timestep": torch.randint(1, 51, (batch,)),
        "features": torch.randn(batch, FEATURES),
        "gene_ids": IDS,
    }


def stir(model: HingeModel) -> HingeModel:
    """Away from zero, where products hide gradients."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def location(model: HingeModel, **changes) -> torch.Tensor:
    return model(**{**inputs(), **changes}).location


def from_plain_backbone() -> torch.Tensor:
    plain, batch = backbone(), inputs()
    with torch.no_grad():
        return plain.decode(plain(batch["values"], batch["visible"], IDS))


# --- the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"injection": "cross_attention"}, {"tuning": "full"}, {"tuning": "lora"}, {"norm": "none"}], ids=str
)
def test_these_start_as_the_backbone(options):
    torch.testing.assert_close(location(make(options, gate="linear")), from_plain_backbone(), atol=2e-3, rtol=1e-3)


def test_without_norm_the_start_is_exact():
    torch.testing.assert_close(
        location(make({"norm": "none", "gate": "linear"})), from_plain_backbone(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["layer norm", "random start", "adaln-zero", "concatenation"])
def test_these_do_not(name):
    assert (location(make(OPTIONS[name])) - from_plain_backbone()).abs().max() > 0.01


def test_adaln_zero_starts_with_every_sublayer_closed():
    model, batch = make({"injection": "adaln_zero"}), inputs()
    h = model.backbone.embed(batch["values"], batch["visible"], IDS)
    for block in model.backbone.layers:
        h = block.norm2(block.residual_scale * block.norm1(block.residual_scale * h))
    h = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6)
    torch.testing.assert_close(location(model), model.backbone.decode(h).detach())


def test_the_condition_tokens_leave_the_genes_in_their_places():
    model = stir(make({"injection": "concatenation"}))
    order = torch.randperm(GENES)
    batch = inputs()
    # a permutation of the genes permutes what the backbone decodes; per-gene parameters would not follow
    plain = make({"injection": "concatenation"}, gene_factors=False, head="point", condition_on_visible=None)
    permuted = {"values": batch["values"][:, order], "visible": batch["visible"][:, order], "gene_ids": IDS[order]}
    torch.testing.assert_close(location(plain, **permuted), location(plain)[:, order], atol=1e-5, rtol=1e-4)
    assert model.tokens(*(batch[key] for key in batch)).shape == (5, 1 + GENES, 16)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_every_trained_parameter_gets_a_gradient_and_the_rest_stays(name):
    options = OPTIONS[name]
    model = stir(make(options))
    model(**inputs()).loss(torch.rand(5, GENES)).mean().backward()
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    rows = {"tuned_backbone.gene_embedding.weight"}  # of which a panel has some
    silent = [key for key, value in trained.items() if value.grad is None or not value.grad.any()]
    assert silent == []
    assert all(value.grad is None for key, value in model.named_parameters() if key not in trained)
    assert all((value.grad is not None) == value.requires_grad for value in model.backbone.parameters())
    of_backbone = {key for key in trained if key.startswith("tuned_backbone.")}
    if options.get("tuning") == "full":
        assert rows < of_backbone
    elif options.get("tuning") == "lora":
        assert of_backbone and all("lora_" in key for key in of_backbone)
        assert {key.split(".")[4] for key in of_backbone} == {"qkvu", "uv", "out"}
    else:
        assert not of_backbone


@pytest.mark.parametrize("name", OPTIONS)
def test_the_condition_is_heeded_after_a_few_steps(name):
    model = make(OPTIONS[name], gene_factors=False)
    before = model.backbone.digest()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(**inputs()).loss(torch.rand(5, GENES) * 4).mean().backward()
        optimizer.step()
    plain = location(model)
    batch = inputs()
    for change in ({"features": batch["features"] + 1}, {"timestep": batch["timestep"] // 2}):
        assert not torch.allclose(location(model, **change), plain)
    assert (model.backbone.digest() == before) == ("tuning" not in OPTIONS[name])


@pytest.mark.parametrize("name", ["soft", "concatenation", "cross-attention", "lora"])
def test_gradient_checkpointing_computes_the_same(name):
    gradients = []
    for checkpointing in (False, True):
        model = stir(make(OPTIONS[name])).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs()).loss(torch.ones(5, GENES)).mean().backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key in gradients[0]:
        torch.testing.assert_close(gradients[0][key], gradients[1][key])


# --- saved and loaded ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_saved_loaded_and_sampled(name, tmp_path):
    model = stir(make(OPTIONS[name])).eval()
    model.save_pretrained(tmp_path / "model")
    again = HingeModel.from_pretrained(tmp_path / "model", backbone())
    assert again.digest() == model.digest()
    assert torch.equal(location(again), location(model))
    scheduler = MaskedDiffusionScheduler(8, "linear")
    features, spots = torch.randn(4, FEATURES), ["a", "b", "c", "d"]
    draws = [
        draw_features(m, scheduler, features, IDS, spots, num_draws=2, num_inference_steps=4, batch_size=size).values
        for m, size in ((model, 8), (again, 3))
    ]
    torch.testing.assert_close(torch.from_numpy(draws[0]), torch.from_numpy(draws[1]), atol=1e-5, rtol=1e-5)
    assert draws[0].std(axis=0).mean() > 0.1


def test_adapters_are_stored_without_the_backbone(tmp_path):
    from safetensors.torch import load_file

    model = stir(make({"tuning": "lora", "lora_rank": 2}))
    model.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert not any(name.endswith("base_layer.weight") or "gene_embedding" in name for name in stored)
    # the adapters do something: without them the model is another one
    before = location(model)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.zero_()
    assert not torch.allclose(location(model), before)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_tuned_model_wants_its_own_backbone_and_all_of_its_weights(tuning, tmp_path):
    from safetensors.torch import load_file, save_file

    make({"tuning": tuning}).save_pretrained(tmp_path / "model")
    with pytest.raises(WeightsError, match="not the backbone weights"):
        HingeModel.from_pretrained(tmp_path / "model", backbone(seed=1))
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.startswith("tuned_backbone."))
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with pytest.raises(WeightsError, match=f"lack one, {name}"):
        HingeModel.from_pretrained(tmp_path / "model", backbone())
    save_file(weights | {"other": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match="has not, other"):
        HingeModel.from_pretrained(tmp_path / "model", backbone())


@pytest.mark.parametrize("tuning", ["frozen", "full", "lora"])
def test_what_is_trained_stays_in_float32(tuning):
    model = make({"tuning": tuning})
    cast_frozen(model.backbone, torch.bfloat16)
    for parameter in itertools.chain(model.parameters(), model.backbone.parameters()):
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs()).loss(torch.rand(5, GENES)).mean().backward()


@pytest.mark.parametrize("masked_input", ["mask_token", "value_plus_zero_token"])
def test_full_tuning_leaves_out_what_is_never_read(masked_input):
    model = stir(HingeModel.from_backbone(backbone(masked_input=masked_input), FEATURES, GENES, tuning="full"))
    model(**inputs()).loss(torch.rand(5, GENES)).mean().backward()
    for key, value in model.backbone.named_parameters():
        assert value.requires_grad == (value.grad is not None and bool(value.grad.any())), key


def test_wrong_options_are_named():
    for option in ("injection", "norm", "start", "tuning"):
        with pytest.raises(ValueError, match=f"{option} must be one of"):
            make({option: "other"})
