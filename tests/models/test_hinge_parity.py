"""The authors' HINGE, number for number: recorded predictions and losses of their own code at tiny width, 40 layers."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

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


@torch.no_grad()
def predict(imported: ImportedHinge, recorded: dict) -> torch.Tensor:
    return imported.model(
        values=recorded["in.x_t"],
        visible=recorded["in.m_t"],
        timestep=recorded["in.t"],
        features=recorded["in.y"],
        gene_ids=imported.gene_ids,
        next_visible=recorded["in.m_prev"],
    ).mean


def one_ulp_further(imported: ImportedHinge, seed: int) -> ImportedHinge:
    """The same model, every weight moved up or down by one unit in the last place."""
    moved = copy.deepcopy(imported.model)
    moved.attach_backbone(copy.deepcopy(imported.model.backbone))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*moved.parameters(), *moved.backbone.parameters()]:
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            target = torch.where(up, torch.inf, -torch.inf)
            parameter.copy_(torch.nextafter(parameter, target.to(parameter)))
    return ImportedHinge(moved, imported.gene_ids)


def tolerance(imported: ImportedHinge, recorded: dict) -> torch.Tensor:
    """(B, 1): 1e-5, or what a last-place change of the weights does to a spot where that is more.

    The random weights make 40 ill-conditioned layers: whether a matrix product adds up its terms in one order or
    another moves some predictions by several 1e-5, in the authors' code as here. No implementation can be closer
    to the recording than its own processor's order of summation allows.
    """
    base = predict(imported, recorded)
    change = torch.stack([predict(one_ulp_further(imported, seed), recorded) - base for seed in range(3)])
    return change.abs().amax(dim=2).mean(dim=0).clamp_min(1e-5).unsqueeze(1)


def test_predictions_and_loss_equal_the_recording(recording):
    recorded, imported = recording
    predicted, allowed = predict(imported, recorded), tolerance(imported, recorded)
    difference = (predicted - recorded["out.pred"]).abs()
    print("difference per spot", difference.amax(dim=1).tolist(), "allowed", allowed.flatten().tolist())
    assert (difference <= allowed).all()
    assert allowed.max() < 1e-3  # or the test would say nothing
    if torch.backends.cpu.get_cpu_capability() == "AVX512":  # as the recording's processor had
        assert (difference.amax(dim=1) <= 1e-5).sum() >= len(difference) - 1

    # the loss of the released code: squared error on the genes revealed between t and t − 1, each of equal weight
    revealed = recorded["in.m_prev"] - recorded["in.m_t"]
    weights = spot_weights(revealed, "gene")
    squared = (predicted - recorded["in.x0"]) ** 2
    loss = (squared * weights).sum() / (revealed.sum(dim=1) > 0).sum()
    # d(loss) = 2 |error| d(prediction)
    slack = (2 * squared.sqrt() * allowed * weights).sum() / weights.sum()
    assert abs(loss - recorded["out.loss"][0]) <= slack.clamp_min(1e-5)


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
            with pytest.raises(ConfigError, match=r"median 2\.00"):
                import_hinge(changed, num_attention_heads=4)


def test_other_files_are_refused(parity, tmp_path):
    with pytest.raises(WeightsError, match="holds a CellFM alone"):
        import_hinge(parity / "cellfm_mindspore_tiny.ckpt", num_attention_heads=4)
    imported = import_hinge(parity / "hinge_reference_init.safetensors", num_attention_heads=4)
    state = export_hinge(imported.model, imported.gene_ids)
    del state["final_layer.proj.bias"], state["cond_embed.time.0.weight"]
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"not a whole checkpoint.*2 tensors are missing"):
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
