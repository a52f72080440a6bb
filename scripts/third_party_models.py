"""Puts models written by others through SAM steps in ONNX, against eager.

Each model (`scripts.third_party_cases`) goes the public way: `TrainStep`, then `check_parity`,
which captures, exports, loads and compares two steps at two batch sizes, and judges by float64.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900.0
SIZES = (4, 3)
"""Examples of the two batches; the graph is the same for both."""


def check(name: str) -> dict[str, Any]:
    """Verdict on one model.

    Returns:
        ``parameters``: their number; ``verdict``: ``right``, ``different`` or ``refused``;
        ``reason``: of what is not right; ``batch``: ``any`` or, where the model's own code fixes
        it, ``fixed``.
    """
    import torch

    import sam_export as sx
    from scripts.third_party_cases import cases

    case = cases()[name]
    torch.manual_seed(0)
    model = case.make().train()
    result: dict[str, Any] = {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch": "any",
    }
    batches = [case.batch(size) for size in SIZES]

    def compare(dynamic: str | None) -> dict[str, Any]:
        sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.01, momentum=0.9)
        step = sx.TrainStep(model, case.loss, sam)
        given = batches if dynamic else batches[:1]
        report = sx.check_parity(step, given, targets=["onnx"], num_steps=2, dynamic=dynamic)
        target = report.targets[0]
        if target.error:
            return {"verdict": "refused", "reason": _line(target.error)}
        if report.ok:
            return {"verdict": "right", "reason": ""}
        bad = [row for row in target.rows if row.verdict == "FAIL"]
        worst = max(bad, key=lambda row: row.relative)
        reason = f"{len(bad)} of {len(target.rows)} differ; {worst.name}: {worst.relative:.1e}"
        return {"verdict": "different", "reason": reason}

    try:
        found = compare("batch")
    except Exception as error:
        found = {"verdict": "refused", "reason": _line(str(error))}
    if found["verdict"] == "refused" and re.search(r"symbolic|'batch'", found["reason"]):
        try:
            again = compare(None)
        except Exception as error:
            again = {"verdict": "refused", "reason": _line(str(error))}
        if again["verdict"] != "refused":
            found = again | {"reason": found["reason"]}
            result["batch"] = "fixed"
    return result | found


def _line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and "no ONNX form" in lines[0]:
        lines = [lines[0], "; ".join(line.split("(")[0].strip() for line in lines[1:])]
    where = re.sub(r"\S*site-packages/", "", " ".join(lines[:3]))
    return where.replace(str(ROOT) + os.sep, "")[:400]


def ask(name: str, log: Any) -> dict[str, Any]:
    """The verdict on one model, from a process of its own."""
    command = [sys.executable, "-m", "scripts.third_party_models", "--one", name]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, timeout=TIMEOUT
        )
        lines = done.stdout.splitlines()
        answer: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        reason = f"the process died ({done.returncode})"
    except subprocess.TimeoutExpired:
        answer, reason = {}, f"took over {TIMEOUT:.0f} s"
    if not answer:
        answer = {"name": name, "parameters": 0, "batch": "", "verdict": "refused",
                  "reason": reason}  # fmt: skip
    return answer | {"seconds": round(time.monotonic() - started, 1)}


def page(results: list[dict[str, Any]], untried: Sequence[str] = ()) -> str:
    """The verdicts as a Markdown page, and the cases that were not run."""
    import onnxruntime
    import torch

    packages = sorted({row["name"].split(": ")[0] for row in results})
    versions = {package: importlib.metadata.version(package) for package in packages}
    right = sum(row["verdict"] == "right" for row in results)
    lines = [
        "# Models written by others, trained in ONNX",
        "",
        "Made by `scripts/third_party_models`: each model, in a small configuration with random",
        "weights, goes through two SAM steps (SGD with momentum, float32) of two batch sizes in",
        "ONNX Runtime, and `check_parity` compares every parameter, buffer and slot with eager by",
        'its change. "right": all agree. "different": some do not. "refused": an error says why.',
        "Where the batch is fixed, the model's own code fixes it (the reason",
        "says where), and it was captured with `dynamic=None`.",
        "",
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, "
        + ", ".join(f"{package} {version}" for package, version in versions.items())
        + f". {right} of {len(results)} are right.",
        "",
        "| package | model | parameters | verdict | batch | reason |",
        "|---|---|---:|---|---|---|",
    ]
    for row in results:
        package, name = row["name"].split(": ")
        reason = row["reason"].replace("|", "\\|")
        lines.append(
            f"| {package} {versions[package]} | {name} | {row['parameters']:,} | {row['verdict']} "
            f"| {row['batch']} | {reason} |"
        )
    if untried:
        lines += ["", f"Not run for this page: {', '.join(untried)}."]
    return "\n".join(lines) + "\n"


def one(name: str) -> None:
    """Prints the verdict on one model as the last line of the output."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    print(json.dumps(check(name)), file=answers, flush=True)


def main() -> int:
    """Writes the verdicts."""
    parser = argparse.ArgumentParser(
        prog="scripts/third_party_models", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--models", help="regular expression of the models' names")
    parser.add_argument("--json", type=Path, help="JSON file of verdicts: read, and added to")
    parser.add_argument("--page", type=Path, help="where to write the Markdown page")
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return 0
    from scripts.third_party_cases import cases

    every = list(cases())
    if not every:
        print("None of torchvision, timm, transformers is installed.", file=sys.stderr)
        return 2
    known: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        known = {row["name"]: row for row in json.loads(options.json.read_text())}
    for name in every:
        if options.models and not re.search(options.models, name):
            continue
        known[name] = ask(name, sys.stderr)
        print(json.dumps(known[name]), flush=True)
        if options.json:
            ordered = [known[name] for name in every if name in known]
            options.json.write_text(json.dumps(ordered, indent=1))
    results = [known[name] for name in every if name in known]
    if options.page:
        options.page.write_text(page(results, [name for name in every if name not in known]))
    return 1 if any(row["verdict"] == "different" for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())
