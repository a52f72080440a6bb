"""What the README shows works: its Python blocks and `sam-export` lines run, in their order."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = (
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "cpp" / "README.md",
)

NOT_RUN = (
    "git",
    "cd",
    "pip",
    "docker",
    "scripts/demo",
    "scripts/test",
    "scripts/test-wide",
    "scripts/bench",
)
"""First words of shell lines that are not run here: they install, or take minutes."""

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block of the README, in order."""
    return [(match[1], match[2]) for match in _BLOCK.finditer(README.read_text())]


def shell_lines(text: str) -> list[list[str]]:
    """The commands of a shell block as words; comments and output are left out."""
    joined = text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone, where the blocks may write."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "models", clone / "models")
    return clone


def run(command: list[str], folder: Path) -> None:
    """Runs a command in the folder; its output is shown when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"


def test_blocks_run_in_their_order(folder: Path) -> None:
    languages = [language for language, _ in blocks()]
    assert "python" in languages
    assert {"bash", "sh", "console"} & set(languages)
    for index, (language, text) in enumerate(blocks()):
        if language == "python":
            script = folder / f"block_{index}.py"
            script.write_text(text)
            run([sys.executable, "-W", "error", script.name], folder)
        elif language in ("bash", "sh"):
            for words in shell_lines(text):
                if words[0] == "sam-export":
                    run([sys.executable, "-m", "sam_export", *words[1:]], folder)
                else:
                    assert words[0] in NOT_RUN, f"the test does not know how to run {words}"


def test_scripts_that_it_names_are_there() -> None:
    for language, text in blocks():
        for words in shell_lines(text) if language in ("bash", "sh") else []:
            if words[0].startswith("scripts/"):
                assert os.access(ROOT / words[0], os.X_OK), f"{words[0]} cannot be run"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_guide_of_stages_runs(folder: Path) -> None:
    """Its Python blocks, as one script."""
    text = (ROOT / "docs" / "staged.md").read_text()
    script = folder / "staged.py"
    script.write_text("\n".join(m[2] for m in _BLOCK.finditer(text) if m[1] == "python"))
    run([sys.executable, "-W", "error", script.name], folder)
