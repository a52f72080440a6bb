"""The artifact: a folder that holds one step in one target's form.

``manifest.json``, ``state.safetensors`` (parameters, buffers and slots at export time) and a
file per program, or one for all. It is readable without torch and without this package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sam_export.artifact.contract import StepContract
from sam_export.artifact.manifest import MANIFEST_FILE, STATE_FILE, FileEntry, Manifest
from sam_export.artifact.semantics import Semantics
from sam_export.artifact.state_file import (
    differences,
    first_few,
    hidden_sibling,
    read_shapes,
    read_state,
    shapes_of,
    sync,
    write_state,
)
from sam_export.errors import ArtifactError


@dataclass(frozen=True)
class LoweredFile:
    """A file of an artifact: a program in its target's form, several, or none.

    Attributes:
        name: File name in the artifact (``step.onnx``).
        data: Its content.
    """

    name: str
    data: bytes


@dataclass(frozen=True)
class Lowered:
    """A step in a target's form, still in memory; what every lowering returns.

    Attributes:
        target: Name of the target.
        contract: Names, dtypes and shapes of everything that goes in and out.
        semantics: What one step means.
        files: Program name to its file, for each program of the contract. Programs may share one.
        state: Parameters, buffers and slots at export time, with the contract's dtypes.
        versions: Package name to version, of everything that shaped the files.
        details: JSON values that the target tells its engine and the user.
        others: Files that hold no program of the contract.
    """

    target: str
    contract: StepContract
    semantics: Semantics
    files: dict[str, LoweredFile]
    state: dict[str, NDArray[Any]]
    versions: dict[str, str]
    details: dict[str, Any]
    others: tuple[LoweredFile, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk that has been checked: hashes, format, contract, state.

    Attributes:
        path: The folder.
        target: Name of the target.
        contract: Names, dtypes and shapes of everything that goes in and out.
        semantics: What one step means.
        files: Program name to file name.
        versions: Package name to the version that wrote it.
        details: JSON values that the target tells its engine and the user.
        others: Names of the files that hold no program, beside manifest and state.
        digests: Name of each file that holds a program to its SHA-256, in hexadecimal.
    """

    path: Path
    target: str
    contract: StepContract
    semantics: Semantics
    files: dict[str, str]
    versions: dict[str, str]
    details: dict[str, Any]
    others: tuple[str, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)

    def file(self, program: str) -> Path:
        """Path of a program's file; `ArtifactError` when there is no such program."""
        return self.path / self.files[self.contract.program(program).name]

    def state(self) -> dict[str, NDArray[Any]]:
        """The initial state, read from the disk, in the contract's order."""
        state = read_state(self.path / STATE_FILE)
        _check_state(shapes_of(state), self.contract, self.path)
        return {spec.name: state[spec.name] for spec in self.contract.state}

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        names = (MANIFEST_FILE, STATE_FILE, *set(self.files.values()), *self.others)
        return sum((self.path / name).stat().st_size for name in names)


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Opens an artifact after checking all of it.

    Args:
        path: The folder.

    Raises:
        ArtifactError: The folder, the manifest or a file is missing; the manifest is not JSON, has
            another format number or contradicts itself; a file's content is not what was written;
            or the state does not match the contract.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry)
    shapes, _ = read_shapes(folder / STATE_FILE)
    _check_state(shapes, manifest.contract, folder)
    return Artifact(
        path=folder,
        target=manifest.target,
        contract=manifest.contract,
        semantics=manifest.semantics,
        files={
            program: name for name, entry in manifest.files.items() for program in entry.programs
        },
        versions=manifest.versions,
        details=manifest.details,
        others=tuple(
            name
            for name, entry in manifest.files.items()
            if not entry.programs and name != STATE_FILE
        ),
        digests={name: entry.sha256 for name, entry in manifest.files.items() if entry.programs},
    )


def write_artifact(
    lowered: Lowered, path: str | os.PathLike[str], overwrite: bool = False
) -> Artifact:
    """Writes an artifact; the folder appears complete and checked, or not at all.

    Args:
        lowered: What to write.
        path: The folder to make; missing parents are made too.
        overwrite: Whether an artifact that is there already may be replaced. The old one stays
            until the new one is complete.

    Returns:
        The new artifact, as `open_artifact` reads it.

    Raises:
        ArtifactError: Something is there already (with ``overwrite``: something that is not just an
            artifact), the parts do not fit together, or the disk refuses.
    """
    shown = Path(path)
    final = Path(os.path.realpath(shown))
    _check_lowered(lowered)
    _check_free(shown, overwrite)
    partial, old = hidden_sibling(final), hidden_sibling(final)
    made = _missing_parents(final)
    moving = False
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        _fill(partial, lowered)
        artifact = open_artifact(partial)
        if overwrite and final.exists():
            os.rename(final, old)
        moving = True
        os.rename(partial, final)
        sync(final.parent)
    except BaseException as error:
        if moving and not partial.exists():
            os.rename(final, partial)
        if old.exists():
            os.rename(old, final)
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not made yet, or in use by somebody else by now
                parent.rmdir()
        if isinstance(error, OSError):
            raise ArtifactError(
                f"Cannot write the artifact {shown}: {error}. Nothing was changed."
            ) from error
        raise
    shutil.rmtree(old, ignore_errors=True)
    return replace(artifact, path=shown)


def _missing_parents(path: Path) -> list[Path]:
    return [parent for parent in path.parents if not parent.exists()]


def _fill(folder: Path, lowered: Lowered) -> None:
    entries: dict[str, FileEntry] = {}
    for name, (programs, data) in _by_file(lowered).items():
        (folder / name).write_bytes(data)
        sync(folder / name)
        entries[name] = _entry(folder / name, programs)
    write_state(folder / STATE_FILE, lowered.state)
    entries[STATE_FILE] = _entry(folder / STATE_FILE, ())
    manifest = _manifest_of(lowered, entries)
    (folder / MANIFEST_FILE).write_bytes(manifest.to_json())
    sync(folder / MANIFEST_FILE)
    sync(folder)


def _by_file(lowered: Lowered) -> dict[str, tuple[tuple[str, ...], bytes]]:
    """File name to the programs in it and its content."""
    files: dict[str, tuple[tuple[str, ...], bytes]] = {}
    for program, file in lowered.files.items():
        programs, data = files.get(file.name, ((), file.data))
        if data is not file.data:
            raise ArtifactError(f"Two programs want the file {file.name}, each its own content.")
        files[file.name] = ((*programs, program), data)
    for file in lowered.others:
        if file.name in files:
            raise ArtifactError(f"The file {file.name} is wanted twice.")
        files[file.name] = ((), file.data)
    return files


def _manifest_of(lowered: Lowered, entries: dict[str, FileEntry]) -> Manifest:
    return Manifest(
        target=lowered.target,
        contract=lowered.contract,
        semantics=lowered.semantics,
        files=entries,
        versions=lowered.versions,
        details=lowered.details,
    )


def _check_lowered(lowered: Lowered) -> None:
    """Refuses what the reader would refuse, before anything is written."""
    files = _by_file(lowered)
    names = list(files)
    if len({name.casefold() for name in (*names, STATE_FILE)}) != len(names) + 1:
        raise ArtifactError(
            f"Files need names that differ in more than case, other than {STATE_FILE}; found "
            f"{', '.join(names)}."
        )
    entries = {name: FileEntry("", 0, programs) for name, (programs, _) in files.items()}
    _manifest_of(lowered, {**entries, STATE_FILE: FileEntry("", 0, ())}).to_json()
    lines = differences(shapes_of(lowered.state), lowered.contract.state)
    if lines:
        raise ArtifactError(f"The state to write does not match the contract: {first_few(lines)}.")


def _check_free(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise ArtifactError(f"{path} is there already and is not a folder. Choose another path.")
    if not overwrite:
        raise ArtifactError(
            f"{path} exists already. Choose another path, or pass overwrite=True to replace the "
            "artifact in it."
        )
    try:
        manifest = _read_manifest(path)
    except ArtifactError as error:
        raise ArtifactError(
            f"{path} will not be overwritten, since it is not an artifact that this version knows: "
            f"{error} Delete it by hand if nobody needs it."
        ) from error
    foreign = sorted({item.name for item in path.iterdir()} - {MANIFEST_FILE, *manifest.files})
    if foreign:
        raise ArtifactError(
            f"{path} will not be overwritten, since it also holds files that are not the "
            f"artifact's: {', '.join(foreign)}. Move them away, or choose another path."
        )


def _read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        found = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ArtifactError(f"{folder} {found}. Give the folder that sam_export.export wrote.")
    path = folder / MANIFEST_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} holds no {MANIFEST_FILE}, so it is not a sam_export artifact."
        ) from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error
    try:
        return Manifest.from_json(data)
    except ArtifactError as error:
        raise ArtifactError(f"{path} cannot be used. {error}") from error


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    if not path.is_file():
        held = " and ".join(map(repr, entry.programs))
        what = f"the program {held}" if held else "a part of the artifact"
        what = "the initial state" if name == STATE_FILE else what
        raise ArtifactError(f"{path} is missing; it holds {what}. Copy the whole folder again.")
    try:
        found = _entry(path, entry.programs)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error
    if found != entry:
        size = "" if found.bytes == entry.bytes else f" {found.bytes} bytes, not {entry.bytes};"
        raise ArtifactError(
            f"{path} is not the file that was written:{size} SHA-256 {found.sha256[:12]}…, the "
            f"manifest says {entry.sha256[:12]}…. It was damaged or changed; export or copy the "
            "artifact again."
        )


def _entry(path: Path, programs: tuple[str, ...]) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(digest, file.tell(), programs)


def _check_state(shapes: Any, contract: StepContract, folder: Path) -> None:
    lines = differences(shapes, contract.state)
    if lines:
        raise ArtifactError(
            f"{folder / STATE_FILE} does not match the contract: {first_few(lines)}. Export the "
            "artifact again."
        )
