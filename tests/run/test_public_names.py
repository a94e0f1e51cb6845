"""The names that `hinge` offers."""

import importlib

import pytest

import hinge


@pytest.mark.parametrize("name", sorted(set(hinge.__all__) - {"__version__"}))
def test_public_names_are_there_and_documented(name):
    assert getattr(hinge, name).__doc__


@pytest.mark.parametrize("name", sorted(hinge._DEPRECATED))
def test_names_of_version_0_1_warn(name):
    with pytest.warns(DeprecationWarning, match=rf"hinge\.{name} is deprecated; use hinge\."):
        found = getattr(hinge, name)
    module, _, new = hinge._DEPRECATED[name].rpartition(".")
    assert found is getattr(importlib.import_module(module), new)


def test_another_name_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hinge.nothing  # noqa: B018
