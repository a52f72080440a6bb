"""The folder of an artifact: whole or not there, and refused when it is not what was written."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sam_export.artifact import folder as folder_module
from sam_export.artifact.folder import LoweredFile, open_artifact, write_artifact
from sam_export.artifact.manifest import FileEntry
from sam_export.artifact.state_file import write_state
from sam_export.errors import ArtifactError
from tests.artifact.toy import (
    ADAMW,
    edit_json,
    files_of,
    make_contract,
    make_lowered,
    random_state,
)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    lowered = make_lowered(make_contract(slots=ADAMW, optimizer="AdamW"))
    written = write_artifact(lowered, tmp_path / "deep" / "er" / "toy")
    artifact = open_artifact(tmp_path / "deep" / "er" / "toy")
    assert artifact == written
    assert artifact.contract == lowered.contract
    assert artifact.semantics == lowered.semantics
    assert (artifact.target, artifact.versions) == (lowered.target, lowered.versions)
    assert artifact.details == lowered.details
    assert artifact.files == {name: f"{name}.bin" for name in lowered.files}
    for program, file in lowered.files.items():
        assert artifact.file(program).read_bytes() == file.data
    state = artifact.state()
    assert list(state) == [spec.name for spec in lowered.contract.state]
    for name, array in lowered.state.items():
        assert (state[name].dtype, state[name].shape) == (array.dtype, array.shape)
        assert state[name].tobytes() == array.tobytes()
    names = {"manifest.json", "state.safetensors", *artifact.files.values()}
    assert set(os.listdir(artifact.path)) == names
    assert artifact.size == sum(os.path.getsize(artifact.path / name) for name in names)
    with pytest.raises(ArtifactError, match="No program 'backwards'"):
        artifact.file("backwards")


def test_the_same_step_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_artifact(make_lowered(), tmp_path / name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_manifest_is_plain_json_with_the_documented_fields(tmp_path: Path) -> None:
    artifact = write_artifact(make_lowered(), tmp_path / "toy")
    values = json.loads((artifact.path / "manifest.json").read_text())
    assert values["format"] == 1
    assert set(values) == {
        *("format", "target", "contract", "semantics", "files", "versions", "details"),
    }
    assert values["files"]["step.bin"].keys() == {"sha256", "bytes", "programs"}
    assert str(tmp_path) not in (artifact.path / "manifest.json").read_text()


def test_the_folder_has_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    artifact = write_artifact(make_lowered(), tmp_path / "toy")
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE(artifact.path.stat().st_mode) == expected


# -- a destination that is taken ------------------------------------------------------------------


def test_an_existing_folder_or_file_is_left_alone(tmp_path: Path) -> None:
    write_artifact(make_lowered(), tmp_path / "toy")
    (tmp_path / "file").write_text("precious")
    before = files_of(tmp_path)
    with pytest.raises(ArtifactError, match="toy exists already.*overwrite=True"):
        write_artifact(make_lowered(), tmp_path / "toy")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="file is there already and is not a folder"):
            write_artifact(make_lowered(), tmp_path / "file", overwrite)
    assert files_of(tmp_path) == before


def test_overwrite_replaces_an_artifact_by_a_whole_new_one(tmp_path: Path) -> None:
    write_artifact(make_lowered(), tmp_path / "toy")
    other = make_lowered(make_contract(slots=()), target="other")
    artifact = write_artifact(other, tmp_path / "toy", overwrite=True)
    assert open_artifact(tmp_path / "toy") == artifact
    assert artifact.target == "other"
    assert os.listdir(tmp_path) == ["toy"]


def test_overwrite_of_nothing_is_a_plain_write(tmp_path: Path) -> None:
    assert write_artifact(make_lowered(), tmp_path / "toy", overwrite=True).target == "numpy"


def test_a_damaged_artifact_may_be_overwritten(tmp_path: Path) -> None:
    artifact = write_artifact(make_lowered(), tmp_path / "toy")
    artifact.file("step").unlink()
    write_artifact(make_lowered(), tmp_path / "toy", overwrite=True)
    assert open_artifact(tmp_path / "toy") == artifact


@pytest.mark.parametrize("manifest", [None, "{}", '{"format": 99}', "nonsense"])
def test_overwrite_spares_a_folder_that_is_no_artifact(
    tmp_path: Path, manifest: str | None
) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "thesis.txt").write_text("precious")
    if manifest is not None:
        (tmp_path / "toy" / "manifest.json").write_text(manifest)
    before = files_of(tmp_path)
    with pytest.raises(ArtifactError, match="toy will not be overwritten, since it is not an arti"):
        write_artifact(make_lowered(), tmp_path / "toy", overwrite=True)
    assert files_of(tmp_path) == before


def test_overwrite_spares_foreign_files_beside_the_artifact(tmp_path: Path) -> None:
    write_artifact(make_lowered(), tmp_path / "toy")
    (tmp_path / "toy" / "run.ckpt").write_text("a week of training")
    before = files_of(tmp_path)
    with pytest.raises(ArtifactError, match=r"files that are not the artifact's: run\.ckpt\."):
        write_artifact(make_lowered(), tmp_path / "toy", overwrite=True)
    assert files_of(tmp_path) == before


def test_a_link_to_an_artifact_keeps_being_a_link(tmp_path: Path) -> None:
    write_artifact(make_lowered(), tmp_path / "real")
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    write_artifact(make_lowered(target="new"), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert open_artifact(tmp_path / "real").target == "new"


# -- failures while writing -----------------------------------------------------------------------


def _fail(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


ORDER = ("step.bin", "evaluate.bin", "evaluate_loss.bin", "state.safetensors", "manifest.json")
FAILURES = {
    "disk full": OSError(28, "No space left on device"),
    "interrupt": KeyboardInterrupt(),
    "bug": RuntimeError("bug"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["write_state", "sync", "open_artifact", "second rename"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, failure: str, overwrite: bool
) -> None:
    path = tmp_path / "new" / "toy"
    if overwrite:
        write_artifact(make_lowered(), path)
    before = files_of(tmp_path)
    error = FAILURES[failure]
    if where == "second rename":
        rename = os.rename

        def rename_until_the_last(source: Path, destination: Path) -> None:
            if destination == path and not path.exists() and "tmp" in source.name:
                monkeypatch.undo()
                raise error
            rename(source, destination)

        monkeypatch.setattr(folder_module.os, "rename", rename_until_the_last)
    else:
        monkeypatch.setattr(folder_module, where, _fail(error))
    expected = ArtifactError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_artifact(make_lowered(target="other"), path, overwrite)
    if isinstance(error, OSError):
        assert "Cannot write the artifact" in str(caught.value)
        assert "No space left on device" in str(caught.value)
    assert files_of(tmp_path) == before


def test_a_failure_after_the_last_rename_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "toy"
    write_artifact(make_lowered(), path)
    before = files_of(tmp_path)
    sync = folder_module.sync

    def failing(target: Path) -> None:
        if target == tmp_path:
            raise OSError(5, "Input/output error")
        sync(target)

    monkeypatch.setattr(folder_module, "sync", failing)
    with pytest.raises(ArtifactError, match="Input/output error"):
        write_artifact(make_lowered(target="other"), path, overwrite=True)
    assert files_of(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize(
    ("largest", "limit"),
    [("evaluate_loss.bin", 100), ("state.safetensors", 200), ("manifest.json", 1000)],
)
def test_a_disk_that_fills_up_leaves_nothing_behind(
    tmp_path: Path, largest: str, limit: int
) -> None:
    """A real failure in the middle of a real write: the kernel refuses to let a file grow."""
    sizes = {
        path.name: path.stat().st_size
        for path in write_artifact(make_lowered(), tmp_path / "probe").path.iterdir()
    }
    first = next(name for name in ORDER if sizes[name] > limit)
    assert first.startswith(largest)  # the case is what it says
    code = (
        "import resource, sys\n"
        "from tests.artifact.toy import make_lowered\n"
        "from sam_export.artifact.folder import write_artifact\n"
        "from sam_export.errors import ArtifactError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        "    write_artifact(make_lowered(), sys.argv[1])\n"
        "except ArtifactError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "toy")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert "Cannot write the artifact" in result.stdout
    assert "File too large" in result.stdout
    assert os.listdir(tmp_path) == ["probe"]


def test_parts_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    plain = make_lowered()
    state = dict(plain.state)
    del state["bias"]
    state["weight"] = state["weight"].astype(np.float64)
    with pytest.raises(ArtifactError, match=r"bias: missing; weight: float64\[1, 3\], expected"):
        write_artifact(make_lowered(state=state), tmp_path / "toy")
    case = {**plain.files, "step": LoweredFile("Evaluate.bin", b"")}
    taken = {**plain.files, "step": LoweredFile("state.safetensors", b"")}
    for files in (case, taken):
        with pytest.raises(ArtifactError, match="need names that differ in more than case"):
            write_artifact(make_lowered(files=files), tmp_path / "toy")
    files = {name: LoweredFile("all.bin", bytes([i] * 9)) for i, name in enumerate(plain.files)}
    with pytest.raises(ArtifactError, match="Two programs want the file all.bin"):
        write_artifact(make_lowered(files=files), tmp_path / "toy")
    files = {**plain.files, "step": LoweredFile("../step.bin", b"")}
    with pytest.raises(ArtifactError, match="'../step.bin' cannot be a file"):
        write_artifact(make_lowered(files=files), tmp_path / "toy")
    with pytest.raises(ArtifactError, match="cannot be written as JSON"):
        write_artifact(make_lowered(details={"a": object()}), tmp_path / "toy")
    with pytest.raises(ArtifactError, match="hold the programs step, the contract has"):
        write_artifact(make_lowered(files={"step": plain.files["step"]}), tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_programs_may_share_a_file(tmp_path: Path) -> None:
    file = LoweredFile("all.bin", b"everything")
    lowered = make_lowered(files=dict.fromkeys(make_lowered().files, file))
    artifact = write_artifact(lowered, tmp_path / "toy")
    assert {artifact.file(name) for name in artifact.files} == {tmp_path / "toy" / "all.bin"}
    assert len(artifact.files) == 3
    assert artifact.size == sum(item.stat().st_size for item in (tmp_path / "toy").iterdir())


# -- damage ---------------------------------------------------------------------------------------


def test_a_missing_folder_a_file_and_a_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="absent does not exist"):
        open_artifact(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file is a file, not a folder"):
        open_artifact(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json, so it is not"):
        open_artifact(tmp_path / "empty")


@pytest.mark.parametrize("name", ["step.bin", "evaluate.bin", "state.safetensors"])
def test_a_flipped_byte_a_lost_tail_and_a_missing_file_are_refused(
    tmp_path: Path, name: str
) -> None:
    artifact = write_artifact(make_lowered(), tmp_path / "toy")
    path = artifact.path / name
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 7)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ArtifactError, match=f"{name} is not the file that was written: SHA"):
            open_artifact(artifact.path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=f"written: {len(whole) - 1} bytes, not {len(whole)};"):
        open_artifact(artifact.path)
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing; it holds the"):
        open_artifact(artifact.path)
    path.write_bytes(whole)
    assert open_artifact(artifact.path) == artifact


def test_an_unknown_format_number_says_what_to_do(tmp_path: Path) -> None:
    artifact = write_artifact(make_lowered(), tmp_path / "toy")
    edit_json(artifact.path / "manifest.json", format=2)
    with pytest.raises(ArtifactError, match=r"manifest\.json cannot be used\. Its format number"):
        open_artifact(artifact.path)


def test_state_that_does_not_match_the_contract_is_refused(tmp_path: Path) -> None:
    artifact = write_artifact(make_lowered(), tmp_path / "toy")
    other = random_state(make_contract(slots=ADAMW))
    path = artifact.path / "state.safetensors"
    write_state(path, other)
    values = json.loads((artifact.path / "manifest.json").read_text())
    entry = folder_module._entry(path, None)
    assert isinstance(entry, FileEntry)
    values["files"]["state.safetensors"] |= {"sha256": entry.sha256, "bytes": entry.bytes}
    edit_json(artifact.path / "manifest.json", files=values["files"])
    with pytest.raises(ArtifactError, match=r"slot\.momentum_buffer\.weight: missing.*and 4 more"):
        open_artifact(artifact.path)


def test_state_that_changes_after_opening_is_refused_when_read(tmp_path: Path) -> None:
    artifact = write_artifact(make_lowered(), tmp_path / "toy")
    write_state(artifact.path / "state.safetensors", {"weight": np.zeros(3, np.float32)})
    with pytest.raises(ArtifactError, match="does not match the contract: bias: missing"):
        artifact.state()
