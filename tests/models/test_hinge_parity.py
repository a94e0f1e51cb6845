"""The authors' HINGE, number for number: recorded predictions and losses of their own code at tiny width, 40 layers."""

import json

import pytest
import torch
from helpers.parity import assert_equals_recording
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.diffusion import MaskedDiffusionScheduler, loss_mask, spot_weights
from hinge.models import HingeModel
from hinge.sharing.convert import RELEASED_DIFFUSION
from hinge.sharing.released_hinge import RELEASED_MODEL, ImportedHinge, export_hinge, import_hinge, write_hinge
from hinge.utils.errors import ConfigError, WeightsError

RECORDINGS = ("init", "random", "random_lineargate")


@pytest.fixture(params=RECORDINGS)
def recording(request, parity) -> tuple[dict, ImportedHinge]:
    """Recorded tensors, and the model imported from the weights among them."""
    path = parity / f"hinge_reference_{request.param}.safetensors"
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["config"])
    return load_file(path), import_hinge(path, gate=meta["gate"], num_attention_heads=meta["heads"])


class _Whole(nn.Module):
    """A model with its backbone as a submodule, so that both are cast and changed together."""

    def __init__(self, model: HingeModel):
        super().__init__()
        self.model, self.backbone = model, model.backbone


def test_predictions_and_loss_equal_the_recording(recording):
    recorded, imported = recording
    # the loss of the released code: squared error on the genes revealed between t and t − 1, each of equal weight
    revealed = recorded["in.m_prev"] - recorded["in.m_t"]
    weights = spot_weights(revealed, "gene")

    def compute(whole: _Whole) -> dict[str, torch.Tensor]:
        dtype = whole.backbone.dtype
        predicted = whole.model(
            values=recorded["in.x_t"].to(dtype),
            visible=recorded["in.m_t"].to(dtype),
            timestep=recorded["in.t"],
            features=recorded["in.y"].to(dtype),
            gene_ids=imported.gene_ids,
            next_visible=recorded["in.m_prev"].to(dtype),
        ).mean
        squared = (predicted - recorded["in.x0"]) ** 2
        return {"predicted": predicted, "loss": (squared * weights).sum() / (revealed.sum(dim=1) > 0).sum()}

    outputs = {"predicted": recorded["out.pred"], "loss": recorded["out.loss"][0]}
    assert_equals_recording(_Whole(imported.model), compute, outputs)


def test_import_and_export_are_exact(recording, tmp_path):
    recorded, imported = recording
    state = {name.removeprefix("state."): tensor for name, tensor in recorded.items() if name.startswith("state.")}
    exported = export_hinge(imported.model, imported.gene_ids)
    assert exported.keys() == state.keys()
    for name, tensor in state.items():
        assert (exported[name].dtype, exported[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(exported[name], tensor), name
    path = write_hinge(imported.model, imported.gene_ids, tmp_path / "model.pth")
    assert torch.load(path, weights_only=True).keys() == {"model"}
    again = import_hinge(path, gate=imported.model.config.gate, num_attention_heads=4)
    assert again.model.digest() == imported.model.digest()
    assert again.model.backbone.digest() == imported.model.backbone.digest()
    assert torch.equal(again.gene_ids, imported.gene_ids)


def test_masks_follow_the_recorded_order(recording):
    recorded, _ = recording
    scheduler = MaskedDiffusionScheduler(**RELEASED_DIFFUSION)
    # genes are masked from the first of the order on; ours are masked from the largest number on
    uniform = 1 - recorded["in.order"].argsort(dim=1) / recorded["in.order"].shape[1]
    assert torch.equal(scheduler.visible_at(recorded["in.t"], uniform), recorded["in.m_t"])
    assert torch.equal(scheduler.visible_at(recorded["in.t"] - 1, uniform), recorded["in.m_prev"])
    revealed = recorded["in.m_prev"] - recorded["in.m_t"]
    assert torch.equal(loss_mask(scheduler, recorded["in.t"], recorded["in.m_t"], uniform, "revealed"), revealed)


def test_gates_are_judged_by_their_biases(parity, tmp_path):
    path = parity / "hinge_reference_init.safetensors"
    assert import_hinge(path, num_attention_heads=4).model.config.gate == "sigmoid"
    imported = import_hinge(path, num_attention_heads=4)
    for bias, gate in ((1.0, "linear"), (2.0, None)):
        with torch.no_grad():
            imported.model.modulation.bias.fill_(bias)
        changed = write_hinge(imported.model, imported.gene_ids, tmp_path / "changed.pth")
        if gate:
            assert import_hinge(changed, num_attention_heads=4).model.config.gate == gate
        else:
            with pytest.raises(ConfigError, match=r"median of its biases is 2\.00"):
                import_hinge(changed, num_attention_heads=4)


def test_other_files_are_refused(parity, tmp_path):
    with pytest.raises(WeightsError, match="contains CellFM only"):
        import_hinge(parity / "cellfm_mindspore_tiny.ckpt", num_attention_heads=4)
    imported = import_hinge(parity / "hinge_reference_init.safetensors", num_attention_heads=4)
    state = export_hinge(imported.model, imported.gene_ids)
    del state["final_layer.proj.bias"], state["cond_embed.time.0.weight"]
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"an incomplete checkpoint.*2 tensors are missing"):
        import_hinge(tmp_path / "part.pth", num_attention_heads=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "gaussian"}, "model.head gaussian"),
        ({"modulation_rank": 2}, "model.modulation_rank 2"),
        ({"gene_factors": True}, "model.gene_factors True"),
        ({"standardise_features": True}, "model.standardise_features True"),
        ({"condition_on_visible": "current"}, "condition_on_visible current"),
    ],
)
def test_what_the_authors_code_cannot_hold_is_not_exported(options, message):
    backbone = CellFMModel(CellFMConfig(num_genes=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    model = HingeModel.from_backbone(backbone, 5, 7, **{**RELEASED_MODEL, **options})
    with pytest.raises(ConfigError, match=message):
        export_hinge(model, torch.arange(1, 8))
