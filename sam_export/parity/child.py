"""A session in a process of its own: a crash of a native runtime is then an answer, not the end.

The child is ``python -m sam_export.parity.child FOLDER DEVICE OPTIONS``, the last one JSON with
``cuda`` (`CudaOptions`, or null) and ``in_stages``. It loads the artifact and answers pickled
messages on its standard input, ``(length, bytes)`` each way; whatever else it prints goes to its
standard error, of which the last lines are part of a report. It imports torch only if the
artifact's runtime does.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sam_export.errors import ArtifactError, ParityError, RuntimeUnavailableError, SessionError
from sam_export.runtime.cuda_options import CudaOptions

_LENGTH = struct.Struct("<Q")
_ERRORS = {
    error.__name__: error
    for error in (ArtifactError, ParityError, RuntimeUnavailableError, SessionError)
}


class ChildSession:
    """What `check_parity` needs of a session, run elsewhere.

    Args:
        folder: An artifact.
        device: As `sam_export.load` takes it.
        threads: Threads of torch's operators there.
        seeds: Whether each step is to begin with this process's torch seed.
        hyper: Hyper-parameters of every step, where they are not the artifact's own.
        cuda: As `sam_export.load` takes it.
        in_stages: Whether a step is three calls, of its stages.

    Raises:
        SamExportError: What loading the artifact raised there.
        ChildCrash: The process ended instead.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        threads: int,
        seeds: bool,
        hyper: Mapping[str, Any] | None = None,
        cuda: CudaOptions | None = None,
        in_stages: bool = False,
    ) -> None:
        self._options = {"cuda": cuda.to_dict() if cuda else None, "in_stages": in_stages}
        self._folder, self._device, self._seeds = folder, device, seeds
        self._hyper = dict(hyper or {})
        self._threads = threads
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        arguments = [str(self._folder), self._device, json.dumps(self._options)]
        command = [sys.executable, "-m", "sam_export.parity.child", *arguments]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
        )
        hello = self._listen()
        self.provider: str = hello["provider"]
        self.contract: Any = hello["contract"]
        self.known_rounding: dict[str, float] = hello["known_rounding"]
        self.facts: dict[str, Any] = hello["facts"]

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of all state, by name."""
        state: dict[str, NDArray[Any]] = self._ask("state")
        return state

    def set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Makes ``state`` the current one."""
        self._ask("set_state", dict(state))

    def step(self, *batch: Any, **hyper: Any) -> ChildResult:
        """Runs one step."""
        seed = None
        if self._seeds:
            import torch

            seed = torch.initial_seed()
        arrays = [_as_arrays(value) for value in batch]
        return ChildResult(**self._ask("step", arrays, {**self._hyper, **hyper}, seed))

    def resume(self, path: Path) -> None:
        """Saves a checkpoint to ``path``, ends the process, and goes on from it in a new one."""
        self._ask("save", str(path))
        self.close(keep_log=True)
        self._start()
        self._ask("restore", str(path))

    def close(self, keep_log: bool = False) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                # What it did not live to read is still in the pipe's buffer.
                with suppress(BrokenPipeError):
                    if stream is not None:
                        stream.close()
            self._process = None
        if not keep_log:
            self._log.close()

    def peak_memory(self) -> int:
        """Largest resident memory of the process so far, in bytes."""
        return int(self._ask("peak_memory"))

    def _ask(self, what: str, *arguments: Any) -> Any:
        if self._process is None or self._process.stdin is None:
            raise ChildCrash("its process has ended")
        with suppress(BrokenPipeError):  # `_listen` says why
            _send(self._process.stdin, (what, arguments))
        return self._listen()

    def _listen(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        message = _receive(self._process.stdout)
        if message is None:
            raise ChildCrash(self._ending())
        kind, value = message
        if kind == "error":
            name, text = value
            if name in _ERRORS:
                raise _ERRORS[name](text)
            raise RuntimeError(f"{name}: {text}")
        return value

    def _ending(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {-code} ({signal.Signals(-code).name})"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        last = "; ".join(line.strip() for line in lines if line.strip())[-300:]
        return f"its process ended with {how}" + (f"; its last words: {last}" if last else "")


class ChildCrash(RuntimeError):
    """The process of a target ended in the middle."""


class ChildResult:
    """The fields of `StepResult` that are compared, as Python numbers."""

    def __init__(self, **values: Any) -> None:
        self.loss: float = values["loss"]
        self.perturbed_loss: float = values["perturbed_loss"]
        self.grad_norm: float = values["grad_norm"]
        self.perturbation_norm: float = values["perturbation_norm"]
        self.perturbed_grad_norm: float | None = values["perturbed_grad_norm"]
        self.loss_scale: float | None = values["loss_scale"]
        self.finite: bool = values["finite"]
        self.stages: dict[str, NDArray[Any]] = values["stages"]


def _as_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_arrays(item) for key, item in value.items()}
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _send(stream: IO[bytes], message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """The next message; None where the other end is closed."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    return pickle.loads(data) if len(data) == length else None


# -- in the child ------------------------------------------------------------------------------


def serve(
    folder: str,
    device: str,
    options: Mapping[str, Any],
    requests: IO[bytes],
    answers: IO[bytes],
) -> None:
    """Loads the artifact and answers until ``requests`` ends."""
    from sam_export.api import load
    from sam_export.parity.in_stages import InStages

    cuda = None if options["cuda"] is None else CudaOptions(**options["cuda"])
    try:
        session = load(folder, device=device, cuda=cuda)
        stepping = InStages(session) if options["in_stages"] else session
    except Exception as error:
        _send(answers, ("error", (type(error).__name__, str(error))))
        return
    hello = {
        "provider": session.provider,
        "contract": session.contract,
        "known_rounding": session.known_rounding,
        "facts": session.facts,
    }
    _send(answers, ("value", hello))

    def step(batch: list[Any], hyper: dict[str, Any], seed: int | None) -> dict[str, Any]:
        if seed is not None and "torch" in sys.modules:
            sys.modules["torch"].manual_seed(seed)
        result = stepping.step(*batch, **hyper)
        names = ("loss", "perturbed_loss", "grad_norm", "perturbation_norm")
        found = {n: getattr(result, n) for n in (*names, "perturbed_grad_norm", "loss_scale")}
        return {
            **{name: None if value is None else float(value) for name, value in found.items()},
            "finite": bool(result.finite),
            "stages": {name: np.asarray(value) for name, value in result.stages.items()},
        }

    def peak_memory() -> int:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    commands: dict[str, Callable[..., Any]] = {
        "state": lambda: session.state,
        "set_state": session.set_state,
        "step": step,
        "save": session.save,
        "restore": session.restore,
        "peak_memory": peak_memory,
    }
    while (message := _receive(requests)) is not None:
        what, arguments = message
        try:
            answer = ("value", commands[what](*arguments))
        except Exception as error:
            answer = ("error", (type(error).__name__, str(error)))
        _send(answers, answer)


def main() -> None:
    """The child's whole life."""
    # Standard output is the protocol; what a library prints there must not get into it.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    folder, device, options = sys.argv[1:]
    serve(folder, device, json.loads(options), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
