"""Checkpoints: exact, of one step only, and whole even when the writer is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_export.artifact import state_file
from sam_export.artifact.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from sam_export.artifact.contract import StepContract, TensorSpec
from sam_export.artifact.state_file import read_shapes, read_state, write_state
from sam_export.errors import ArtifactError
from tests.artifact.toy import ADAMW, BIG, MODEL, files_of, make_contract, random_state

HYPER = {"lr": (0.1,), "rho": (0.05,)}
KEY = "sam_export.checkpoint"
PLAIN = make_contract()


def saved(path: Path, contract: StepContract, seed: int = 0) -> dict[str, Any]:
    state = random_state(contract, seed)
    save_checkpoint(path, state, 7, {"lr": (0.1,), "rho": (0.05,)}, contract)
    return state


def random_contract(generator: np.random.Generator) -> StepContract:
    dtypes = ["float16", "float32", "float64", "int64", "int8", "bool"]
    state = tuple(
        TensorSpec(
            f"層.{index}/é",
            "parameter",
            str(generator.choice(dtypes)),
            tuple(int(size) for size in generator.integers(0, 4, generator.integers(0, 4))),
        )
        for index in range(int(generator.integers(1, 12)))
    )
    groups = tuple((spec.name,) for spec in state[:3])
    hyper = tuple(replace(spec, defaults=(0.0,) * len(groups)) for spec in make_contract().hyper)
    return replace(make_contract(), state=state, groups=groups, hyper=hyper, programs=())


@pytest.mark.parametrize("seed", range(12))
def test_a_random_checkpoint_comes_back_bit_for_bit(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    contract = random_contract(generator)
    state = {}
    for spec in contract.state:
        shape = tuple(int(size) for size in spec.shape)
        raw = np.frombuffer(generator.bytes(8 * 64), spec.dtype)[: int(np.prod(shape))]
        array = raw.reshape(shape) if spec.dtype != "bool" else generator.random(shape) < 0.5
        state[spec.name] = np.asarray(array)  # any bits: infinities and NaNs with payload too
    hyper = {
        spec.name: tuple(float(x) for x in generator.standard_normal(len(contract.groups)))
        for spec in contract.hyper
    }
    count = int(generator.integers(0, 2**62))
    save_checkpoint(tmp_path / "c", state, count, hyper, contract)
    found = load_checkpoint(tmp_path / "c", contract)
    assert list(found.state) == [spec.name for spec in contract.state]
    for name, array in state.items():
        assert (found.state[name].dtype, found.state[name].shape) == (array.dtype, array.shape)
        assert found.state[name].tobytes() == array.tobytes()
    assert found.hyper == hyper
    assert found.step_count == count


def test_equal_runs_write_equal_bytes_and_any_reader_can_open_them(tmp_path: Path) -> None:
    contract = make_contract()
    state = saved(tmp_path / "a", contract)
    saved(tmp_path / "b", contract)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    _, metadata = read_shapes(tmp_path / "a")
    header = json.loads(metadata[KEY])
    assert header == {
        "format": 1,
        "step_count": 7,
        "hyper": {"lr": [0.1], "rho": [0.05]},
        "optimizer": "SGD",
        "fingerprint": fingerprint(contract),
    }
    assert read_state(tmp_path / "a")["weight"].tobytes() == state["weight"].tobytes()


def test_only_what_state_means_is_in_the_fingerprint() -> None:
    plain = make_contract()
    same = [
        replace(plain, dims={"batch": 2}, batch_kind="dict"),
        replace(plain, programs=plain.programs[:1], output_tree={"tuple": ["tensor"]}),
        replace(plain, hyper=tuple(replace(spec, defaults=(9.0,)) for spec in plain.hyper)),
    ]
    assert {fingerprint(contract) for contract in same} == {fingerprint(plain)}
    weight, *others = plain.state
    changed = [
        *(replace(weight, **change) for change in (
            {"name": "w"}, {"role": "buffer"}, {"dtype": "float64"}, {"shape": (3, 1)}
        )),
    ]  # fmt: skip
    different = [replace(plain, state=(spec, *others)) for spec in changed]
    different += [
        replace(plain, state=(*others, weight)),
        replace(plain, groups=(("weight",), ("bias",))),
        replace(plain, optimizer="Adam"),
    ]
    prints = {fingerprint(contract) for contract in different}
    assert len(prints) == len(different)
    assert fingerprint(plain) not in prints


def test_a_folder_is_made_where_it_is_missing_and_a_link_stays_a_link(tmp_path: Path) -> None:
    contract = make_contract()
    saved(tmp_path / "runs" / "today" / "a.ckpt", contract)
    (tmp_path / "last").symlink_to(tmp_path / "runs" / "today" / "a.ckpt")
    state = saved(tmp_path / "last", contract, seed=5)
    assert (tmp_path / "last").is_symlink()
    found = load_checkpoint(tmp_path / "runs" / "today" / "a.ckpt", contract)
    assert found.state["weight"].tobytes() == state["weight"].tobytes()


# -- refusals -------------------------------------------------------------------------------------


def test_missing_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    contract = make_contract()
    path = tmp_path / "c"
    with pytest.raises(ArtifactError, match="c does not exist"):
        load_checkpoint(path, contract)
    saved(path, contract)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="damaged, cut off, or not a safetensors file"):
            load_checkpoint(path, contract)
    path.write_bytes(b"PK\x03\x04" + bytes(500))
    with pytest.raises(ArtifactError, match="damaged, cut off, or not a safetensors file"):
        load_checkpoint(path, contract)
    write_state(path, random_state(contract))
    with pytest.raises(ArtifactError, match=r"is no checkpoint.*Session\.save wrote"):
        load_checkpoint(path, contract)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_contract(slots=()), r"slot\.momentum_buffer\.weight: missing; slot\.momentum_buff"),
        (
            make_contract(slots=ADAMW, optimizer="AdamW"),
            r"and 4 more\. It was saved with AdamW, this step has SGD",
        ),
        (
            replace(PLAIN, state=(replace(MODEL[0], shape=(2, 3)), *PLAIN.state[1:])),
            r"weight: float32\[2, 3\], expected float32\[1, 3\]",
        ),
        (make_contract(optimizer="Lion"), "its tensors fit.*the optimizer Lion, this step has SGD"),
        (
            make_contract(groups=(("bias", "weight"),)),
            "its tensors fit.*other roles or parameter groups",
        ),
    ],
)
def test_a_checkpoint_of_another_step_names_the_difference(
    tmp_path: Path, other: StepContract, message: str
) -> None:
    saved(tmp_path / "c", other)
    with pytest.raises(ArtifactError, match=message):
        load_checkpoint(tmp_path / "c", make_contract())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has checkpoint format 2; this version of sam_export reads format 1"),
        ({"format": None}, "has checkpoint format None"),
        ({"step_count": -1}, "step_count is -1"),
        ({"step_count": "3"}, "step_count is '3'"),
        ({"hyper": {"lr": [0.1]}}, r"this step has lr \(1\), rho \(1\)"),
        ({"hyper": {"lr": [0.1, 0.2], "rho": [0.1]}}, "its hyper-parameters are"),
        ({"hyper": {"lr": [10**400], "rho": [0.1]}}, "its hyper-parameters are"),
        ({"hyper": {"lr": [float("nan")], "rho": [0.1]}}, "its hyper-parameters are"),
        ({"hyper": {"lr": ["0.1"], "rho": [0.1]}}, "its hyper-parameters are"),
        ({"hyper": [1]}, "its hyper-parameters are"),
    ],
)
def test_a_header_that_is_not_sound_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    contract = make_contract()
    state = saved(tmp_path / "c", contract)
    _, metadata = read_shapes(tmp_path / "c")
    header = {**json.loads(metadata[KEY]), **changes}
    write_state(tmp_path / "c", state, {KEY: json.dumps(header)})
    with pytest.raises(ArtifactError, match=message):
        load_checkpoint(tmp_path / "c", contract)


@pytest.mark.parametrize("header", ["", "{", "[]", "3"])
def test_a_header_that_is_no_json_object_is_refused(tmp_path: Path, header: str) -> None:
    write_state(tmp_path / "c", random_state(make_contract()), {KEY: header})
    with pytest.raises(ArtifactError, match="header is not JSON|checkpoint format None"):
        load_checkpoint(tmp_path / "c", make_contract())


def test_state_that_does_not_match_is_not_written(tmp_path: Path) -> None:
    contract = make_contract()
    saved(tmp_path / "c", contract)
    before = files_of(tmp_path)
    state = {**random_state(contract), "weight": np.zeros((3, 1), np.float32)}
    with pytest.raises(ArtifactError, match=r"weight: float32\[3, 1\], expected float32\[1, 3\]"):
        save_checkpoint(tmp_path / "c", state, 1, HYPER, contract)
    with pytest.raises(ArtifactError, match="its hyper-parameters are"):
        save_checkpoint(tmp_path / "c", random_state(contract), 1, {"lr": (0.1,)}, contract)
    with pytest.raises(ArtifactError, match="is a folder; a checkpoint is one file"):
        save_checkpoint(tmp_path, random_state(contract), 1, HYPER, contract)
    assert files_of(tmp_path) == before


def test_a_file_that_is_replaced_while_it_is_read_is_not_mixed_with_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = saved(tmp_path / "c", PLAIN)
    plain_shapes = state_file._shapes

    def shapes_then_replaced(file: Any) -> Any:
        found = plain_shapes(file)
        save_checkpoint(tmp_path / "c", random_state(PLAIN, seed=1), 8, HYPER, PLAIN)
        return found

    monkeypatch.setattr(state_file, "_shapes", shapes_then_replaced)
    found = load_checkpoint(tmp_path / "c", PLAIN)
    assert found.step_count == 7
    assert found.state["weight"].tobytes() == state["weight"].tobytes()


# -- failures while writing -----------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["save_file", "sync", "replace"])
def test_a_failure_keeps_the_old_checkpoint_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    contract = make_contract()
    saved(tmp_path / "c", contract)
    before = files_of(tmp_path)

    def fail(*_: object) -> None:
        raise error

    owner: Any = state_file.os if where == "replace" else state_file
    monkeypatch.setattr(owner, where, fail)
    expected: Any = ArtifactError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        saved(tmp_path / "c", contract, seed=1)
    if isinstance(error, OSError):
        assert "Cannot write the checkpoint" in str(caught.value)
        assert "No space left on device" in str(caught.value)
    assert files_of(tmp_path) == before


WRITER = """
import os, signal, sys
import numpy as np
from tests.artifact.toy import BIG
from sam_export.artifact import state_file
from sam_export.artifact.checkpoint import save_checkpoint

path, first, point, call = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
calls = 0
plain = getattr(os, point, None)

def die(*args, **kwargs):
    global calls
    calls += 1
    if calls == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args, **kwargs)

if plain is not None:
    setattr(os, point, die)
for count in range(first, first + 100_000):
    state = {spec.name: np.full(spec.shape, count, spec.dtype) for spec in BIG.state}
    save_checkpoint(path, state, count, {'lr': (0.1,), 'rho': (0.05,)}, BIG)
"""


def writer(path: Path, first: int, point: str = "never", call: int = 0) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(first), point, str(call)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )


def whole_count(path: Path) -> int:
    """The step count of a checkpoint whose every number is that count."""
    found = load_checkpoint(path, BIG)
    for name, array in found.state.items():
        np.testing.assert_array_equal(array, np.float32(found.step_count), err_msg=name)
    return found.step_count


needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")


KILLER = """
import hashlib, json, os, signal, sys, time
import numpy as np
from sam_export.artifact.checkpoint import load_checkpoint, save_checkpoint
from tests.artifact.toy import BIG

path, kills = sys.argv[1], int(sys.argv[2])

def state_of(count):
    generator = np.random.default_rng(count)
    return {s.name: generator.standard_normal(s.shape).astype(s.dtype) for s in BIG.state}

def digest_of(state):
    return hashlib.sha256(b"".join(state[s.name].tobytes() for s in BIG.state)).hexdigest()

def write(first, pipe):
    for count in range(first, first + 100_000):
        state = state_of(count)
        os.write(pipe, json.dumps(["begun", count, digest_of(state)]).encode() + b"\\n")
        save_checkpoint(path, state, count, {"lr": (0.1 * count,), "rho": (0.05,)}, BIG)
        os.write(pipe, json.dumps(["done", count, ""]).encode() + b"\\n")

moments = np.random.default_rng()  # others in every run
found_begun = 0
last = 0
for kill in range(kills):
    reading, writing = os.pipe()
    pid = os.fork()  # nothing has threads here
    if pid == 0:
        os.close(reading)
        write(last + 1, writing)
    os.close(writing)
    lines = os.fdopen(reading, "rb")
    seen = [lines.readline()]  # it has begun to write
    time.sleep(float(moments.exponential(0.01)))
    os.kill(pid, signal.SIGKILL)
    seen += lines.readlines()
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    told = [json.loads(line) for line in seen if line.endswith(b"\\n")]
    digests = {count: digest for what, count, digest in told if what == "begun"}
    done = max((count for what, count, _ in told if what == "done"), default=last)
    begun = max(digests)
    assert begun in (done, done + 1)
    if begun == 1 and not os.path.exists(path):
        continue  # killed in the very first one
    saved = load_checkpoint(path, BIG)
    assert saved.step_count in (done, begun), (saved.step_count, done, begun)
    expected = digests.get(saved.step_count) or digest_of(state_of(saved.step_count))
    assert digest_of(saved.state) == expected
    assert saved.hyper["lr"] == (0.1 * saved.step_count,)
    found_begun += begun > done
    last = saved.step_count
print(json.dumps({"in the middle": found_begun, "last": last}))
"""


@needs_sigkill
def test_a_hundred_kills_leave_the_last_checkpoint_or_the_one_before(tmp_path: Path) -> None:
    """Each kill comes at another random moment; the hash of what was written is kept outside."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "c"), "100"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["in the middle"] > 20, counts  # or the kills have missed what they are for
    assert counts["last"] > 0


@needs_sigkill
@pytest.mark.parametrize(
    ("point", "call", "last"),
    [("fsync", 1, None), ("replace", 1, None), ("fsync", 2, 1), ("fsync", 3, 1), ("replace", 2, 1)],
)
def test_a_writer_killed_between_two_calls_leaves_the_old_or_the_new_one(
    tmp_path: Path, point: str, call: int, last: int | None
) -> None:
    path = tmp_path / "c"
    assert writer(path, 1, point, call).wait(timeout=60) == -signal.SIGKILL
    if last is None:
        assert not path.exists()
    else:
        assert whole_count(path) == last
