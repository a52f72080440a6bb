"""Batches for `sam-export train`."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_export.artifact.contract import ProgramSpec, StepContract, TensorSpec
from sam_export.cli.errors import CommandError
from sam_export.cli.train_data import ArraySource, open_source

CONTRACT = StepContract(
    state=(),
    hyper=(),
    batch=(
        TensorSpec("x", "input", "float32", ("batch", 3)),
        TensorSpec("y", "target", "int64", ("batch",)),
    ),
    batch_kind="tuple",
    dims={"batch": 2},
    programs=(ProgramSpec("step", ("x", "y"), (), {}),),
    output_tree="tensor",
    groups=(),
    optimizer="SGD",
)
FIXED = replace(
    CONTRACT,
    batch=(
        TensorSpec("x", "input", "float32", (4, 3)),
        TensorSpec("y", "target", "int64", (4,)),
    ),
    dims={},
)


def arrays(count: int) -> dict[str, Any]:
    """Examples whose values are their numbers."""
    numbers = np.arange(count)
    return {"x": np.repeat(numbers[:, None], 3, axis=1).astype(np.float32), "y": numbers}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of nine examples."""
    path = tmp_path / "data.npz"
    np.savez(path, **arrays(9))
    return path


def source(
    path: Path, size: int = 4, seed: int | None = 0, training: bool = True, **changes: Any
) -> ArraySource:
    """The source over a file."""
    contract = replace(CONTRACT, **changes)
    made = open_source(str(path), contract, size, seed, training)
    assert isinstance(made, ArraySource)
    return made


def labels(data: ArraySource, epoch: int) -> list[list[int]]:
    """The numbers of the examples in each batch, after checking that x and y belong together."""
    found = []
    for x, y in data.batches(epoch):
        assert (x == y[:, None]).all()
        found.append(y.tolist())
    return found


def test_each_epoch_has_every_example_once_in_an_order_of_its_own(file: Path) -> None:
    data = source(file, size=3)
    first, second = labels(data, 0), labels(data, 1)
    assert list(map(len, first)) == [3, 3, 3]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(9))
    assert first != second
    assert labels(source(file, size=3), 1) == second
    assert labels(source(file, size=3, seed=1), 1) != second


def test_without_seed_the_order_is_that_of_the_file(file: Path) -> None:
    data = source(file, seed=None, training=False)
    assert labels(data, 5) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_rest_below_the_minimum_is_left_out(file: Path, tmp_path: Path) -> None:
    data = source(file)
    assert data.left_out == 1
    assert list(map(len, labels(data, 0))) == [4, 4]
    assert len(data.batches(0)) == 2  # type: ignore[arg-type]
    np.savez(tmp_path / "ten.npz", **arrays(10))
    data = source(tmp_path / "ten.npz")
    assert data.left_out == 0
    assert list(map(len, labels(data, 0))) == [4, 4, 2]


def test_fixed_batch(file: Path) -> None:
    data = source(file, batch=FIXED.batch, dims={})
    assert data.left_out == 1
    assert list(map(len, labels(data, 0))) == [4, 4]
    with pytest.raises(CommandError, match="batches of exactly 4"):
        source(file, size=3, batch=FIXED.batch, dims={})


def test_dict_batches(file: Path) -> None:
    batch = next(iter(source(file, batch_kind="dict").batches(0)))
    assert isinstance(batch, dict)
    assert list(batch) == ["x", "y"]


def test_arrays_by_position(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", *arrays(9).values())
    assert sorted(chain(*labels(source(tmp_path / "data.npz", size=3), 0))) == list(range(9))


def test_other_arrays_in_the_file_are_no_obstacle(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays(9), names=np.array(["a"]))
    assert source(tmp_path / "data.npz").examples == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": arrays(9)["x"]}, r"holds x; expected x float32\[batch, 3\], y int64\[batch\]"),
        ({**arrays(9), "y": arrays(9)["x"]}, r"y in .* is float32\[9, 3\]; expected int64"),
        ({**arrays(9), "x": np.zeros((9, 3))}, r"x in .* is float64\[9, 3\]; expected float32"),
        ({**arrays(9), "x": np.zeros((9, 2), "f4")}, r"is float32\[9, 2\]; expected float32"),
        ({**arrays(9), "x": np.zeros((9, 3, 1), "f4")}, r"is float32\[9, 3, 1\]; expected"),
        ({**arrays(9), "y": np.arange(8)}, "different numbers of examples: x 9, y 8"),
        (arrays(1), "has 1 examples; one batch needs at least 2"),
        ({**arrays(9), "y": np.array([{}] * 9)}, "cannot be read as a .npz file: Object arrays"),
    ],
)
def test_arrays_that_do_not_fit(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **content)
    with pytest.raises(CommandError, match=message):
        source(tmp_path / "data.npz")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"does not exist; expected a \.npz file or module:func"):
        source(tmp_path / "nothing")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(CommandError, match=r"cannot be read as a \.npz file"):
        source(tmp_path / "text.npz")
    np.savez(tmp_path / "cut.npz", **arrays(9))
    data = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(CommandError, match=r"cannot be read as a \.npz file"):
        source(tmp_path / "cut.npz")
    np.save(tmp_path / "one.npy", np.arange(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(CommandError, match="holds one bare array"):
        source(tmp_path / "one.npz")


def test_batch_size_below_the_minimum(file: Path) -> None:
    with pytest.raises(CommandError, match="--batch-size 1: this step takes at least 2"):
        source(file, size=1)
    assert len(labels(source(file, size=1, training=False), 0)) == 9


def test_scalar_in_the_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays(9), weight=np.float32(1))
    batch = (*CONTRACT.batch, TensorSpec("weight", "target", "float32", ()))
    with pytest.raises(CommandError, match="weight of this step is a single number"):
        source(tmp_path / "data.npz", batch=batch)


def test_functions(tmp_path: Path) -> None:
    code = (
        "def by_epoch(epoch):\n    return [epoch]\n"
        "def fixed(size=3):\n    return iter(range(size))\n"
        "def none():\n    pass\n"
        "def one():\n    return {'x': 1}\n"
    )
    (tmp_path / "data.py").write_text(code)

    def batches(name: str) -> Any:
        opened = open_source(f"{tmp_path}/data.py:{name}", CONTRACT, 4, 0, training=True)
        assert opened.examples is None
        return opened.batches(7)

    assert batches("by_epoch") == [7]
    assert list(batches("fixed")) == [0, 1, 2]
    for name in ("none", "one"):
        with pytest.raises(CommandError, match="expected a list of batches"):
            batches(name)
