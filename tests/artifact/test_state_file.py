"""Tensors in a safetensors file: exact, deterministic, refused when damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sam_export.artifact.contract import TensorSpec
from sam_export.artifact.state_file import differences, read_shapes, read_state, write_state
from sam_export.errors import ArtifactError

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
DTYPES = ["bool", "float16", "float32", "float64", *INTEGERS]


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    state = {}
    for dtype in DTYPES:
        for shape in [(), (1,), (0, 3), (2, 3, 4)]:
            raw = generator.integers(0, 2, shape) if dtype == "bool" else generator.bytes(8 * 24)
            array = (
                np.asarray(raw, dtype=bool)
                if dtype == "bool"
                else np.frombuffer(raw, dtype)[: int(np.prod(shape))].reshape(shape)
            )
            state[f"{dtype}{len(shape)}"] = array
    path = tmp_path / "state.safetensors"
    write_state(path, state)
    found = read_state(path)
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name
    shapes, _ = read_shapes(path)
    assert shapes == {name: (array.dtype.name, array.shape) for name, array in state.items()}


def test_a_view_is_written_by_its_values_and_not_by_its_memory(tmp_path: Path) -> None:
    plain = np.arange(6, dtype=np.float32).reshape(2, 3)
    views = {
        "transposed": plain.T,
        "strided": plain[:, ::2],
        "repeated": np.broadcast_to(np.float32(7), (2, 2)),
        "big_endian": plain.astype(">f4"),
    }
    write_state(tmp_path / "s", views)
    for name, array in read_state(tmp_path / "s").items():
        np.testing.assert_array_equal(array, views[name])
        assert array.dtype == np.float32
        assert array.dtype.isnative


def test_equal_state_gives_equal_bytes(tmp_path: Path) -> None:
    state = {f"t{i}": np.full((i,), i, np.float32) for i in range(20)}
    write_state(tmp_path / "a", state)
    write_state(tmp_path / "b", dict(reversed(state.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_was_read_does_not_hang_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_state(path, {"a": np.ones(1000, np.float32)})
    state = read_state(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - 4000)
        file.write(bytes(4000))
    np.testing.assert_array_equal(state["a"], np.ones(1000, np.float32))
    state["a"][0] = 5.0
    assert read_state(path)["a"][0] == 0.0


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="'a' is complex128; a state file holds bool"):
        write_state(tmp_path / "s", {"a": np.ones(2, np.complex128)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"abc", b"x" * 1000, b"\x05" + bytes(7) + b"{]}  "])
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s"
    path.write_bytes(content)
    for read in (read_state, read_shapes):
        with pytest.raises(ArtifactError, match="damaged, cut off, or not a safetensors file"):
            read(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="absent does not exist"):
        read_state(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="damaged, cut off, or not"):
        read_state(tmp_path)


def test_differences_name_each_tensor_and_what_is_wrong() -> None:
    specs = [TensorSpec(name, "parameter", "float32", (2, 3)) for name in "abcd"]
    found = {
        "a": ("float32", (2, 3)),
        "b": ("float64", (2, 3)),
        "c": ("float32", (6,)),
        "e": ("float32", ()),
    }
    assert differences(found, specs) == [
        "d: missing",
        "b: float64[2, 3], expected float32[2, 3]",
        "c: float32[6], expected float32[2, 3]",
        "e: not a tensor of this step",
    ]
    assert differences(dict.fromkeys("abcd", ("float32", (2, 3))), specs) == []
