"""Comparison of a model with a float32 recording of another implementation.

Two correct implementations in float32 differ by rounding, and how much depends on the model: one unit in the last place
of the weights may move an output by far more than one unit. The formula is therefore computed in float64, and the
recording may differ from it by a few times the deviation that such a change of the weights causes in float32.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

FACTOR = 4.0
"""Deviation allowed in a recording, in units of the measured sensitivity."""


def float32_sensitivity(
    model: nn.Module, compute: Callable[[nn.Module], dict[str, Tensor]], repeats: int = 3
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return outputs in float64 and the largest deviation of float32 outputs from them.

    Parameters
    ----------
    model
        Its weights are exact in float32.
    compute
        Outputs of a model by name. It casts floating-point inputs to the type of the model's weights.
    repeats
        Number of float32 models whose weights are changed by one unit in the last place, up or down at random.
    """
    with torch.no_grad():
        exact = compute(copy.deepcopy(model).double())
        deviation = dict.fromkeys(exact, 0.0)
        generator = torch.Generator().manual_seed(0)
        for number in range(repeats + 1):
            changed = copy.deepcopy(model).float()
            if number:
                for parameter in changed.parameters():
                    up = torch.rand(parameter.shape, generator=generator) < 0.5
                    infinity = torch.where(up, torch.inf, -torch.inf).to(parameter)
                    parameter.copy_(torch.nextafter(parameter, infinity))
            for name, output in compute(changed).items():
                deviation[name] = max(deviation[name], (output.double() - exact[name]).abs().max().item())
    return exact, deviation


def assert_equals_recording(
    model: nn.Module, compute: Callable[[nn.Module], dict[str, Tensor]], recorded: dict[str, Tensor]
) -> None:
    """Check that each recorded output differs from the float64 output by no more than rounding explains."""
    exact, deviation = float32_sensitivity(model, compute)
    for name, expected in recorded.items():
        error = (expected.double() - exact[name]).abs().max().item()
        assert error <= FACTOR * deviation[name], (name, error, deviation[name])
