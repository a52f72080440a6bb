"""The command line as a whole: help, errors, exit codes."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from sam_export._version import __version__
from sam_export.cli import app, main
from sam_export.cli.errors import Interrupted
from sam_export.errors import ArtifactError

COMMANDS = ["export", "inspect", "train", "parity", "targets"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"examples:\n  sam-export {command}" in text
    assert "--traceback" in text
    assert max(map(len, text.splitlines())) <= 100


def test_top_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)
    assert "exit codes:" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"sam-export {__version__}"


@pytest.mark.parametrize("argv", [[], ["fly"], ["train"], ["targets", "--faster"]])
def test_wrong_usage_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: sam-export" in capsys.readouterr().err


def run_with(monkeypatch: pytest.MonkeyPatch, error: BaseException, *argv: str) -> int:
    """The exit code of `sam-export targets` when it raises ``error``."""

    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(app.targets, "run", fail)
    return main(["targets", *argv])


def test_our_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, ArtifactError("The file is gone.")) == 2
    assert capsys.readouterr().err == "error: The file is gone.\n"


def test_traceback_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, ArtifactError("The file is gone."), "--traceback") == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert text.endswith("error: The file is gone.\n")


def test_unexpected_error_names_its_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, KeyError("momentum")) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: unexpected KeyError: 'momentum'\n")
    assert "--traceback" in text
    assert "Traceback" not in text


def test_error_of_the_operating_system_names_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, FileNotFoundError(2, "No such file or directory", "x.json")) == 2
    assert capsys.readouterr().err == "error: x.json: No such file or directory.\n"


def test_interrupts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert run_with(monkeypatch, Interrupted(signal.SIGTERM)) == 143


def test_reader_that_goes_away() -> None:
    code = (
        "import sys; from sam_export.cli import app\n"
        "def run(args):\n"
        "    for _ in range(100000): print('line')\n"
        "    return 0\n"
        "app.targets.run = run\n"
        "sys.exit(app.main(['targets']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "line\n"
    child.stdout.close()
    assert child.wait(timeout=60) == 128 + signal.SIGPIPE
    assert child.stderr is not None
    with child.stderr as stream:
        assert stream.read() == ""
