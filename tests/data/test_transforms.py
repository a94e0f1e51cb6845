import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hinge.data import get_transform
from hinge.utils.errors import ConfigError

NAMES = ["log2p1", "log1p_cp10k"]
counts_of_spots = hnp.arrays(
    np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 1_000_000)
)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(counts=counts_of_spots, others=st.integers(0, 10_000_000))
def test_inverse_undoes_forward_in_numpy_and_torch(name, counts, others):
    transform = get_transform(name)
    library_size = counts.sum(axis=1) + others
    values = transform.forward(counts, library_size)
    assert values.dtype == np.float32 and np.isfinite(values).all() and (values >= 0).all()
    np.testing.assert_allclose(transform.inverse(values, library_size), counts, rtol=1e-5, atol=1e-3)

    tensors = transform.forward(torch.from_numpy(counts), torch.from_numpy(library_size))
    assert tensors.dtype == torch.float32
    np.testing.assert_allclose(tensors.numpy(), values, rtol=1e-6, atol=1e-7)
    back = transform.inverse(tensors, torch.from_numpy(library_size))
    np.testing.assert_allclose(back.numpy(), counts, rtol=1e-5, atol=1e-3)


def test_values_are_those_of_the_definitions():
    counts, library_size = np.array([[0, 1, 3]]), np.array([1000])
    np.testing.assert_allclose(get_transform("log2p1").forward(counts, library_size), [[0, 1, 2]], rtol=1e-6)
    np.testing.assert_allclose(
        get_transform("log1p_cp10k").forward(counts, library_size), np.log([[1, 11, 31]]), rtol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_an_empty_spot_is_zero_and_back(name, kind):
    transform = get_transform(name)
    counts, library_size = kind(np.array([[0, 0], [1, 4]])), kind(np.array([0, 5]))
    values = transform.forward(counts, library_size)
    assert (values[0] == 0).all() and (values[1] > 0).all()
    assert np.allclose(transform.inverse(values, library_size), counts)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_inputs_stay_finite(name):
    transform = get_transform(name)
    library_size = np.array([1_000_000.0, 3.0])
    counts = np.array([[60_000, 1], [3, 0]], dtype=np.float16)
    values = transform.forward(counts, library_size)
    assert np.isfinite(values).all()
    for half in (np.float16(values), torch.from_numpy(values).half(), torch.from_numpy(values).bfloat16()):
        library = torch.as_tensor if isinstance(half, torch.Tensor) else np.asarray
        back = np.asarray(transform.inverse(half, library(library_size)))
        assert back.dtype == np.float32 and np.isfinite(back).all()
        np.testing.assert_allclose(back, counts.astype(float), rtol=0.1, atol=0.05)
    # a million counts, as values, come back from half precision too
    million = transform.forward(np.array([[1_000_000]]), np.array([1_000_000]))
    back = transform.inverse(million.astype(np.float16), np.array([1_000_000]))
    np.testing.assert_allclose(back, 1e6, rtol=0.02)


def test_gradients_flow_through():
    counts = torch.tensor([[1.0, 2.0]], requires_grad=True)
    get_transform("log1p_cp10k").forward(counts, torch.tensor([3.0])).sum().backward()
    assert torch.isfinite(counts.grad).all() and (counts.grad > 0).all()


def test_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match=r"no transform 'sqrt'; choose one of log2p1, log1p_cp10k"):
        get_transform("sqrt")
