"""Each default has one value, wherever it can be given."""

import inspect

import pytest

from hinge.cli import histology, sampling, slides, training
from hinge.config import BackboneConfig, DiffusionConfig, FeaturesConfig, ModelConfig, PanelConfig, RunConfig
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.diffusion.defaults import DEFAULT_DRAWS, DEFAULT_STEPS
from hinge.models import HingeModel
from hinge.tasks.finetune import finetune_config, finetune_encoder


def defaults(function) -> dict:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


@pytest.mark.parametrize(
    "function, section",
    [
        (slides.features, FeaturesConfig()),
        (slides.panel, PanelConfig()),
        (training.pretrain_expression, BackboneConfig()),
        (training.pretrain_expression, BackboneConfig().pretrain),
        (histology.finetune_encoder, finetune_config()),
        (MaskedDiffusionScheduler.__init__, DiffusionConfig()),
        (HingeModel.__init__, ModelConfig()),
    ],
)
def test_functions_and_settings_agree(function, section):
    given, fields = defaults(function), section.model_dump()
    shared = given.keys() & fields.keys()
    # the learning rate depends on what is tuned
    differ = {name: (given[name], fields[name]) for name in shared if given[name] not in (None, fields[name])}
    assert shared and not differ


def test_one_transform():
    transform = RunConfig.model_fields["transform"].default
    for command in (histology.finetune_encoder, training.pretrain_expression, finetune_encoder):
        assert defaults(command)["transform"] == transform
    assert defaults(HingeModel.__init__)["transform"] == transform


def test_sampling_takes_its_defaults_from_the_run():
    for command in (sampling.sample, sampling.map_expression):
        given = defaults(command)
        assert given["draws"] is given["steps"] is given["seed"] is None
    section = RunConfig.model_fields["sampling"].annotation()
    assert (section.draws, section.steps) == (DEFAULT_DRAWS, DEFAULT_STEPS)
