"""The MindSpore reader against files that MindSpore wrote and read, and against damaged ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.mindspore import block, checkpoint, content_of, value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hinge.backbones.mindspore import MindSporeCheckpoint, is_mindspore, read_mindspore
from hinge.utils.errors import WeightsError


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and content_of(a) == content_of(b)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "gene_emb": torch.randn(10, 6, generator=draw),
        "flag": torch.tensor([True, False, True]),
        "encoder.0.weight": torch.randn(7, 3, generator=draw).half(),
        "brain": torch.randn(5, generator=draw).bfloat16(),
        "double": torch.randn(2, 2, generator=draw, dtype=torch.float64),
        "ids": torch.arange(-3, 4),
        "small": torch.arange(9).to(torch.uint16),
        "alpha": torch.tensor(0.25),
        "none": torch.zeros(0, 4),
    }


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# -- files of MindSpore's own ------------------------------------------------------------------------------


def test_training_checkpoint_equals_what_mindspore_reads(parity):
    path = parity / "mindspore_training_checkpoint.ckpt"
    found = read_mindspore(path, include_optimizer=True)
    with safe_open(parity / "mindspore_training_checkpoint.safetensors", "pt") as expected:
        assert set(found) == set(expected.keys())
        for name, tensor in found.items():
            # the recording stores MindSpore's one scalar with shape (1,)
            shape = (1,) if name == "learning_rate" else tensor.shape
            assert same(tensor.reshape(shape), expected.get_tensor(name)), name
    assert found["learning_rate"].shape == ()
    weights = read_mindspore(path)
    assert set(found) - set(weights) == {
        "moment1.cls_token",
        "moment1.gene_emb",
        "learning_rate",
        "global_step",
    }


def test_model_checkpoint_equals_the_recorded_state(parity):
    found = read_mindspore(parity / "cellfm_mindspore_tiny.ckpt")
    with safe_open(parity / "cellfm_mindspore_tiny.safetensors", "pt") as expected:
        recorded = expected.keys()
        states = {name.removeprefix("state."): name for name in recorded if name.startswith("state.")}
        assert set(found) == set(states)
        assert all(same(found[name], expected.get_tensor(states[name])) for name in found)


def test_sniff(parity, tmp_path):
    assert is_mindspore(parity / "cellfm_mindspore_tiny.ckpt")
    assert not is_mindspore(parity / "cellfm_mindspore_tiny.safetensors")
    assert not is_mindspore(tmp_path / "missing.ckpt")
    assert not is_mindspore(write(tmp_path / "empty.ckpt", b""))
    assert not is_mindspore(tmp_path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "torch.ckpt")
    assert not is_mindspore(tmp_path / "torch.ckpt")


# -- the format --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crc", [False, True])
@pytest.mark.parametrize("piece", [8, 2**29])
def test_types_pieces_and_trailer(tmp_path, weights, piece, crc):
    path = write(tmp_path / "w.ckpt", checkpoint(weights, piece, crc))
    found = read_mindspore(path)
    assert list(found) == list(weights)
    assert all(same(found[name], weights[name]) for name in weights)
    index = MindSporeCheckpoint(path)
    assert index.keys() == list(weights)
    assert index.dtype("encoder.0.weight") == torch.float16
    for name, tensor in weights.items():
        assert index.shape(name) == tensor.shape


def test_tensors_own_their_memory(tmp_path, weights):
    path = write(tmp_path / "w.ckpt", checkpoint(weights))
    tensor = MindSporeCheckpoint(path).tensor("gene_emb")
    before = path.read_bytes()
    tensor.zero_()
    assert path.read_bytes() == before
    assert same(read_mindspore(path)["gene_emb"], weights["gene_emb"])


def test_scalars_of_both_generations(tmp_path):
    four = np.float32(4).tobytes()
    old, new, none = (
        value("old", [0], "Float32", four),
        value("new", [], "Float32", four),
        value("none", [0], "Float32", b""),
    )
    found = read_mindspore(write(tmp_path / "w.ckpt", old + new + none))
    assert found["old"].shape == found["new"].shape == ()
    assert found["old"] == found["new"] == 4
    assert found["none"].shape == (0,)


def test_packed_dims_any_field_order_and_unknown_fields(tmp_path):
    content = np.arange(6, dtype=np.float32).tobytes()
    tensor = block(3, content) + block(2, b"Float32") + block(9, b"later") + b"\x08\x02\x08\x03"
    swapped = block(1, block(2, tensor) + b"\x38\x01" + block(1, b"swapped"))
    packed = value("packed", [2, 3], "Float32", content, packed=True)
    found = read_mindspore(write(tmp_path / "w.ckpt", packed + swapped))
    assert found["packed"].tolist() == found["swapped"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_notes_are_not_tensors_and_any_byte_is_a_truth(tmp_path):
    note = value("note", [0], "str", "epoch".encode("utf-32-le"))
    state = value("random_op", [0], "random_op", b"abc")
    truth = value("truth", [3], "Bool", b"\x00\x02\xff")
    found = read_mindspore(write(tmp_path / "w.ckpt", note + state + truth), include_optimizer=True)
    assert list(found) == ["truth"]
    assert content_of(found["truth"]) == b"\x00\x01\x01"


def test_only_optimizer_state_is_left_out(tmp_path):
    state = ["moment1.gene_emb", "moment2.a.b", "beta1_power", "learning_rate", "global_step", "epoch_num"]
    kept = ["gene_emb", "moment1", "encoder.moment1.weight", "step_num.weight", "my_learning_rate"]
    content = checkpoint({name: torch.ones(1) for name in state + kept})
    path = write(tmp_path / "w.ckpt", content)
    assert list(read_mindspore(path)) == kept
    assert list(read_mindspore(path, include_optimizer=True)) == state + kept


# -- damage ------------------------------------------------------------------------------------------------


def test_every_truncation_is_found(tmp_path, weights):
    weights = {name: weights[name] for name in ("brain", "alpha", "flag")}
    content = checkpoint(weights, piece=4)
    whole = {len(checkpoint(dict(list(weights.items())[:k]), piece=4)): k for k in range(1, 4)}
    for length in range(len(content) + 1):
        path = write(tmp_path / "w.ckpt", content[:length])
        if length in whole:  # cut between two tensors, it is a checkpoint of fewer
            assert len(read_mindspore(path)) == whole[length]
        else:
            with pytest.raises(WeightsError, match="byte"):
                read_mindspore(path)


def test_crc_finds_a_changed_weight(tmp_path, weights):
    content = bytearray(checkpoint(weights, crc=True))
    content[60] ^= 1
    with pytest.raises(WeightsError, match="damaged: the CRC"):
        MindSporeCheckpoint(write(tmp_path / "w.ckpt", bytes(content)))


HOSTILE = {
    "too few bytes": ([3, 4], "Float32", bytes(40), "ends after 40 of 48 bytes"),
    "too many bytes": ([3, 4], "Float32", bytes(52), "takes 48 bytes but has 52"),
    "negative": ([-1, -4], "Float32", bytes(16), "negative dim -1"),
    "overflow to 0": ([2**32, 2**32], "Float32", b"", "impossible dims"),
    "overflow to the right size": ([2**62 + 1, 4], "Float32", bytes(16), "impossible dims"),
    "40 GB": ([100000, 100000], "Float32", bytes(4), "ends after 4 of 40,000,000,000 bytes"),
    "empty but wide": ([0, 2**62, 2**62], "Float32", b"", "impossible dims"),
    "many dims": ([1] * 1000, "Float32", bytes(4), "more than 32 dims"),
    "half an element": ([1], "Float32", bytes(3), "not whole elements"),
    "type": ([1], "Complex64", bytes(8), "unknown type 'Complex64'"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("packed", [False, True])
def test_hostile_tensors(tmp_path, case, packed):
    dims, tensor_type, content, message = HOSTILE[case]
    path = write(tmp_path / "w.ckpt", value("w", dims, tensor_type, content, packed))
    with pytest.raises(WeightsError, match=message) as caught:
        read_mindspore(path)
    assert "at byte" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pieces_must_agree_and_stop(tmp_path):
    half = value("w", [2], "Float32", bytes(4))
    for further, message in [
        (value("w", [2], "Int32", bytes(4)), "another type"),
        (value("w", [1, 2], "Float32", bytes(4)), "other dims"),
        (value("w", [2], "Float32", bytes(8)), "takes 8 bytes but has 12"),
        (half + half, "a second time"),
        (half + half + value("w", [2], "Float32", b""), "a second time"),
    ]:
        with pytest.raises(WeightsError, match=message):
            read_mindspore(write(tmp_path / "w.ckpt", half + further))


def test_other_and_missing_files(tmp_path, weights):
    for content in [b"", b"PK\x03\x04 a zip", b"\x89HDF\r\n\x1a\n" + bytes(50), b"\n" * 50, bytes(50)]:
        with pytest.raises(WeightsError, match="byte"):
            read_mindspore(write(tmp_path / "w.ckpt", content))
    with pytest.raises(WeightsError, match="there is no file"):
        read_mindspore(tmp_path / "missing.ckpt")
    with pytest.raises(WeightsError, match="cannot read"):
        read_mindspore(tmp_path)
    whole = MindSporeCheckpoint(write(tmp_path / "w.ckpt", checkpoint(weights)))
    with pytest.raises(WeightsError, match="no tensor 'other'; it has 9"):
        whole.tensor("other")
    write(tmp_path / "w.ckpt", b"short")
    with pytest.raises(WeightsError, match=r"cut off .* after it was opened"):
        whole.tensor("gene_emb")


mutations = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "remove", "copy"]),
        st.floats(0, 1),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=6,
)


def mutate(content: bytes, steps: list[tuple[str, float, float, bytes]]) -> bytes:
    for kind, where, other, new in steps:
        at = int(where * len(content))
        if kind == "set":
            content = content[:at] + new + content[at + len(new) :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + new + content[at:]
        elif kind == "remove":
            content = content[:at] + content[at + int(other * 40) :]
        else:
            content += content[at : at + int(other * 200)]
    return content


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=mutations)
def test_mutated_files_are_read_or_refused(tmp_path, weights, steps):
    content = mutate(checkpoint(weights, piece=40, crc=True), steps)
    path = write(tmp_path / "w.ckpt", content)
    is_mindspore(path)
    try:
        found = read_mindspore(path, include_optimizer=True)
    except WeightsError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1500
    else:
        assert sum(tensor.nbytes for tensor in found.values()) <= len(content)
