"""`manifest.json`: what an artifact says about itself.

One JSON object: ``format``, ``target``, ``contract``, ``semantics``, ``files``, ``versions`` and
``details``. The same content gives the same bytes: nothing in it is a time or a place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, get_args

import numpy as np

from sam_export.artifact.contract import (
    METRICS,
    MOVED,
    RUNNING,
    STAGES,
    TRAINING,
    ProgramSpec,
    Role,
    StepContract,
)
from sam_export.artifact.semantics import Semantics
from sam_export.artifact.tree import flatten, unflatten
from sam_export.errors import ArtifactError, SamExportError

FORMAT = 1
"""Number of this layout. A reader refuses every other one."""

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.safetensors"

_KEYS = ("format", "target", "contract", "semantics", "files", "versions", "details")
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, StopIteration, SamExportError)


@dataclass(frozen=True)
class FileEntry:
    """One file of the folder, beside the manifest.

    Attributes:
        sha256: Hash of its content, in hexadecimal.
        bytes: Its size.
        programs: The programs that it holds; the initial state, for one, holds none.
    """

    sha256: str
    bytes: int
    programs: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`.

    Attributes:
        target: Name of the target that the step was lowered to.
        contract: Names, dtypes and shapes of everything that goes in and out.
        semantics: What one step means.
        files: File name to its entry.
        versions: Package name to the version that wrote the artifact.
        details: What the target tells its engine and the user.
    """

    target: str
    contract: StepContract
    semantics: Semantics
    files: dict[str, FileEntry]
    versions: dict[str, str]
    details: dict[str, Any]

    def to_json(self) -> bytes:
        """The file's bytes; the same for equal manifests.

        Raises:
            ArtifactError: The contract contradicts itself, or `details` or `versions` hold
                something that JSON does not.
        """
        self.check()
        try:
            values = {
                "format": FORMAT,
                "target": self.target,
                "semantics": self.semantics.to_dict(),
                "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
                "versions": _sorted(self.versions),
                "details": _sorted(self.details),
                # Not sorted: the order of an output dict's keys is the order of its leaves.
                "contract": self.contract.to_dict(),
            }
            text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
            return (text + "\n").encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ArtifactError(
                f"The manifest cannot be written as JSON: {error}. `details` and `versions` may "
                "hold only text, finite numbers, booleans, None, lists and dicts with text keys."
            ) from error

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            ArtifactError: Not JSON, another format number, or not a sound manifest.
        """
        try:
            values = json.loads(data, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"It is not JSON: {error}.") from error
        if not isinstance(values, dict) or "format" not in values:
            raise ArtifactError("It has no format number; this is not a sam_export artifact.")
        found = values["format"]
        if type(found) is not int or found != FORMAT:
            raise ArtifactError(
                f"Its format number is {found!r}; this version of sam_export reads format "
                f"{FORMAT}. Export the step again, or use the version of sam_export that wrote it "
                f"({_writer(values)})."
            )
        if set(values) != set(_KEYS):
            missing = ", ".join(sorted(set(_KEYS) - set(values))) or "nothing"
            unknown = ", ".join(sorted(set(values) - set(_KEYS))) or "nothing"
            raise ArtifactError(f"Of its fields, missing: {missing}; unknown: {unknown}.")
        try:
            manifest = cls(
                target=values["target"],
                contract=StepContract.from_dict(values["contract"]),
                semantics=Semantics.from_dict(values["semantics"]),
                files={name: _file_entry(entry) for name, entry in values["files"].items()},
                versions=values["versions"],
                details=values["details"],
            )
            manifest.check()
        except ArtifactError:
            raise
        except _MALFORMED as error:
            raise ArtifactError(f"It is malformed: {error!r}.") from error
        return manifest

    def check(self) -> None:
        """Raises `ArtifactError` where the manifest contradicts itself."""
        _require(isinstance(self.target, str) and bool(self.target), "the target has no name")
        for part in (self.versions, self.details):
            _require(isinstance(part, dict), "`versions` and `details` are JSON objects")
        check_contract(self.contract)
        for name, entry in self.files.items():
            _require(
                name not in ("", ".", "..", MANIFEST_FILE) and not set(name) & set('/\\:\0"'),
                f"{name!r} cannot be a file of an artifact; give a plain file name",
            )
            _require(
                isinstance(entry.bytes, int)
                and isinstance(entry.sha256, str)
                and not (entry.programs and name == STATE_FILE),
                f"the entry of {name!r} is not that of a file, or {STATE_FILE} holds a program",
            )
        _require(STATE_FILE in self.files, f"{STATE_FILE} is not among the files")
        held = sorted(program for entry in self.files.values() for program in entry.programs)
        wanted = sorted(program.name for program in self.contract.programs)
        _require(
            held == wanted,
            f"the files hold the programs {', '.join(held) or 'none'}, the contract has "
            f"{', '.join(wanted)}",
        )


def _file_entry(values: dict[str, Any]) -> FileEntry:
    if not isinstance(values["programs"], list):
        raise ArtifactError("It is malformed: the programs of a file are a list.")
    return FileEntry(**{**values, "programs": tuple(values["programs"])})


def check_contract(contract: StepContract) -> None:
    """Checks that a contract is sound in itself: unique names, known roles, matching feeds.

    Raises:
        ArtifactError: It is not, and where.
    """
    try:
        _check_tensors(contract)
        _check_numbers(contract)
        _unique("programs", (program.name for program in contract.programs))
        names = [program.name for program in contract.programs]
        _require("step" in names, "there is no program 'step'")
        _require(
            _is_count(contract.every)
            and contract.every >= 1
            and ("base_step" in names) == (contract.every > 1),
            f"every={contract.every!r} with the programs {', '.join(names)}",
        )
        staged = [name for name in STAGES if name in names]
        _require(
            len(staged) in (0, len(STAGES)) and bool(staged) == bool(contract.carried),
            f"of the stages only {', '.join(staged) or 'none'}, with {len(contract.carried)} "
            "carried tensors",
        )
        for program in contract.programs:
            _check_program(contract, program)
    except ArtifactError:
        raise
    except _MALFORMED as error:
        raise ArtifactError(f"The contract is malformed: {error!r}.") from error


def _check_tensors(contract: StepContract) -> None:
    _unique("graph inputs", (spec.name for spec in contract.inputs))
    outputs = [spec for program in contract.programs for spec in program.outputs]
    for spec in (*contract.inputs, *outputs):
        _require(spec.role in get_args(Role), f"{spec.name}: unknown role {spec.role!r}")
        _require(np.dtype(spec.dtype).name == spec.dtype, f"{spec.name}: dtype {spec.dtype!r}")
    parameters = {spec.name for spec in contract.state if spec.role == "parameter"}
    for spec in contract.state:
        _require(
            all(_is_count(size) for size in spec.shape),
            f"{spec.name}: the shape of state is fixed, found {spec.description}",
        )
        _require(
            spec.role not in ("slot", "memory")
            or (spec.parameter in parameters and bool(spec.slot)),
            f"{spec.name}: slot {spec.slot!r} of an unknown parameter {spec.parameter!r}",
        )
    for spec in contract.batch:
        _require(
            all(_is_count(size) or size in contract.dims for size in spec.shape),
            f"{spec.name}: {spec.description} has a symbolic size that `dims` does not list",
        )
    for group in contract.groups:
        _require(set(group) <= parameters, f"a group holds more than parameters: {group}")


def _check_numbers(contract: StepContract) -> None:
    _require(contract.batch_kind in ("tuple", "dict"), f"batch_kind {contract.batch_kind!r}")
    _require(all(_is_count(least) for least in contract.dims.values()), f"dims {contract.dims}")
    for name, count in contract.multiples.items():
        _require(
            _is_count(count) and count > 1 and contract.dims.get(name, 1) % count == 0,
            f"multiples {contract.multiples} with dims {contract.dims}",
        )
    for hyper in contract.hyper:
        _require(
            len(hyper.defaults) == len(contract.groups) and all(map(math.isfinite, hyper.defaults)),
            f"{hyper.name}: defaults {hyper.defaults}, expected {len(contract.groups)} finite "
            "numbers, one per parameter group",
        )


def _check_program(contract: StepContract, program: ProgramSpec) -> None:
    unknown = sorted(set(program.inputs) - {spec.name for spec in contract.inputs})
    _require(not unknown, f"{program.name}: unknown inputs {', '.join(unknown)}")
    _unique(f"inputs of {program.name}", program.inputs)
    _unique(f"outputs of {program.name}", (spec.name for spec in program.outputs))
    outputs = {spec.name: spec for spec in program.outputs}
    state = {spec.name: spec for spec in contract.state}
    _unique(f"state that {program.name} feeds", program.feeds.values())
    for source, destination in program.feeds.items():
        _require(
            source in outputs
            and destination in state
            and outputs[source].dtype == state[destination].dtype
            and outputs[source].shape == state[destination].shape,
            f"{program.name}: output {source!r} cannot become the state {destination!r}",
        )
    if program.name in TRAINING:
        missing = [name for name in METRICS if name not in outputs]
        _require(not missing, f"{program.name} lacks the outputs {', '.join(missing)}")
    carried = {spec.name: spec for spec in contract.carried}
    for spec in program.outputs:
        if spec.role in ("gradient", "running"):
            name = spec.name.replace(MOVED, RUNNING, 1) if spec.role == "running" else spec.name
            taken = carried.get(name)
            _require(
                taken is None or (taken.dtype, taken.shape) == (spec.dtype, spec.shape),
                f"{program.name}: output {spec.name!r} is not what the next stage takes",
            )
    leaves = [spec.name for spec in program.outputs if spec.role == "output"]
    if leaves:
        placed, _ = flatten(unflatten(contract.output_tree, [np.empty(0)] * len(leaves)))
        named = [name for name, _ in placed]
        _require(named == leaves, f"{program.name}: outputs {leaves}, the output tree has {named}")


def _is_count(size: Any) -> bool:
    return type(size) is int and size >= 0


def _unique(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        _require(name not in seen, f"{name!r} occurs twice among the {what}")
        seen.add(name)


def _require(holds: bool, finding: str) -> None:
    if not holds:
        raise ArtifactError(f"The manifest contradicts itself: {finding}.")


def _sorted(values: dict[str, Any]) -> Any:
    return json.loads(json.dumps(values, sort_keys=True, allow_nan=False))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _writer(values: dict[str, Any]) -> str:
    versions = values.get("versions")
    version = versions.get("sam_export") if isinstance(versions, dict) else None
    return f"sam_export {version}" if version else "it does not say which"
