"""Speed does not change results: fused layers against plain ones, and both against the formulas written out."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch.autograd import gradcheck

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.models import HingeModel, kernels

GENES, FEATURES = 30, 12
IDS = torch.arange(1, GENES + 1)


def plain_script():
    path = ROOT / "benchmarks" / "plain.py"
    spec = importlib.util.spec_from_file_location("plain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_model(seed=0, **options) -> HingeModel:
    """Weights moved away from the start, where half of the gradients are zero."""
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_value_bins": 8}
    backbone = CellFMModel(CellFMConfig(num_genes=GENES, **size))
    options = {"head": "point", "gene_factors": False} | options
    model = HingeModel.from_backbone(backbone, FEATURES, GENES, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.modulation.norm_mix.fill_(-1.0)
        model.modulation.norm_mix_decoder.fill_(-1.0)
    return model.train()


def inputs(batch=7, seed=1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "values": 5 * torch.rand(batch, GENES, generator=generator),
        "visible": (torch.rand(batch, GENES, generator=generator) < 0.4).float(),
        "timestep": torch.randint(1, 51, (batch,), generator=generator),
        "features": torch.randn(batch, FEATURES, generator=generator),
        "gene_ids": IDS,
    }


def predict_and_differentiate(model, bf16=False) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        predicted = model(**inputs()).mean
    (predicted.float() ** 2).mean().backward()
    return predicted.detach().float(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"modulation_rank": 4, "gate": "linear"}, {"condition_on_visible": None}])
def test_fused_layers_equal_plain_ones_in_float32(options):
    model = make_model(**options)
    predicted, gradients = predict_and_differentiate(model)
    model.modulation.fused = False
    plain, plain_gradients = predict_and_differentiate(model)
    torch.testing.assert_close(predicted, plain, atol=1e-5, rtol=0)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    # the fused path was another one: equal to the last bit would mean that it was not taken
    assert not torch.equal(predicted, plain)


def test_bfloat16_layers_stay_within_two_percent_of_float32():
    model = make_model()
    model.modulation.fused = False
    plain, plain_gradients = predict_and_differentiate(model)
    model.modulation.fused = True
    model.backbone.to(torch.bfloat16)
    predicted, gradients = predict_and_differentiate(model, bf16=True)
    assert (predicted - plain).norm() / plain.norm() < 0.02
    for name in ("modulation.weight", "condition.features.0.weight"):
        assert (gradients[name] - plain_gradients[name]).norm() / plain_gradients[name].norm() < 0.1


def test_both_equal_the_formulas():
    model, script = make_model(), plain_script()
    written_out = script.PlainHinge(model)
    expected = written_out(**inputs())
    torch.testing.assert_close(model(**inputs()).mean, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs()).mean, expected, atol=1e-5, rtol=0)

    (expected**2).mean().backward()
    _, gradients = predict_and_differentiate(model.train())
    modulation = torch.cat(
        [*(layer.modulation.weight.grad for layer in written_out.layers), written_out.last.weight.grad]
    )
    torch.testing.assert_close(gradients["modulation.weight"], modulation, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(
        gradients["condition.time.0.weight"], written_out.time[0].weight.grad, atol=1e-5, rtol=1e-3
    )


def test_published_order_of_operations_where_no_gradient_is_asked_for():
    model = make_model().eval()
    with torch.no_grad():
        fused_allowed = model(**inputs()).mean
        model.modulation.fused = False
        assert torch.equal(model(**inputs()).mean, fused_allowed)


def test_dropout_and_checkpointing_go_with_it():
    model = make_model(dropout=0.3)
    torch.manual_seed(5)
    _, plain = predict_and_differentiate(model)
    model.enable_gradient_checkpointing()
    torch.manual_seed(5)
    _, again = predict_and_differentiate(model)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)


def test_gradients_are_those_of_the_functions():
    generator = torch.Generator().manual_seed(0)

    def number(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    h, shift, scale, gate = number(2, 5, 8), number(2, 1, 8), number(2, 1, 8), number(2, 1, 8)
    mix = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *a: kernels.modulate(*a, 1e-6), (h, shift, scale, mix))
    norm = torch.nn.LayerNorm(8, dtype=torch.float64).requires_grad_(False)
    norm.weight.copy_(torch.rand(8, generator=generator) + 0.5)
    assert gradcheck(lambda h, x, gate: kernels.join(h, x, gate, norm, 1.7), (h, number(2, 5, 8), gate))
    mask = torch.tensor([[1.0, 1, 0, 1, 0]] * 2, dtype=torch.float64)
    assert gradcheck(lambda x: kernels._Retain.apply(x, mask, 2, 1e-12), (number(2, 5, 32),))
    assert gradcheck(kernels._Product.apply, (number(2, 5, 16),))


def test_a_head_without_any_query_gives_zero_and_no_nan():
    joint = -torch.ones(1, 3, 32)
    joint.requires_grad_(True)
    out = kernels._Retain.apply(joint, None, 2, 1e-12)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isfinite(joint.grad).all()


def test_the_command_line_starts_in_a_second_without_torch():
    code = "import sys; import hinge, hinge.cli.app; print('torch' in sys.modules, 'anndata' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize("mix", [-12.0, -1.0, 2.0])
def test_the_gradient_of_the_norm_mix_is_accurate_in_bfloat16(mix):
    """It is a sum of differences over all tokens; the difference of two sums rounded to bfloat16 is off by up to 2×."""
    generator = torch.Generator().manual_seed(0)
    # tokens as a layer norm leaves them, where h and LayerNorm(h) nearly agree
    h = F.layer_norm(torch.randn(4, 50, 64, generator=generator), (64,)) * 1.05 + 0.01
    shift, scale = (0.1 * torch.randn(4, 1, 64, generator=generator) for _ in range(2))
    upstream = torch.randn(4, 50, 64, generator=generator) + 0.3 * h
    gradients = {}
    for dtype in (torch.bfloat16, torch.float64):
        # both start from the same rounded numbers
        inputs = [tensor.bfloat16().to(dtype) for tensor in (h, shift, scale)]
        parameter = torch.tensor(mix, dtype=torch.float32 if dtype == torch.bfloat16 else dtype, requires_grad=True)
        kernels.modulate(*inputs, parameter, 1e-6).backward(upstream.bfloat16().to(dtype))
        gradients[dtype] = parameter.grad.double().item()
    assert gradients[torch.bfloat16] == pytest.approx(gradients[torch.float64], rel=5e-3)
