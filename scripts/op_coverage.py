"""Puts every differentiable operator of PyTorch through a SAM step in ONNX, against eager.

Each operator becomes a model (`scripts.op_coverage_cases`) that goes the public way: `TrainStep`,
`capture`, `export`, `load`, one step. Right: the change of every parameter is eager's, to 1e-4 of
it or to ten times eager's own distance from float64. ONNX's reference evaluator runs the same graph
where it can, and is judged in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 8
TIMEOUT = 600.0
TOLERANCE = 1e-4
"""Of a float32 change: some hundred roundings, through a division that may cancel a few bits."""


def check(name: str, count: int) -> dict[str, Any]:
    """Verdict over the samples of one operator.

    Returns:
        ``right``, ``wrong``, ``unsupported``: numbers of samples; ``reason``: of the first that is
        not right.
    """
    from scripts.op_coverage_cases import operators, samples

    info = operators()[name]
    own = samples(info, count)
    result: dict[str, Any] = {"name": name, "right": 0, "wrong": 0, "unsupported": 0, "reason": ""}
    if not own:
        return result | {"reason": "no sample with a real parameter and a real result"}
    verdict, reason, reference = _verdict(own)
    if verdict == "right":
        return result | {"right": len(own), "reference": reference}
    if len(own) == 1:
        return result | {verdict: 1, "reason": reason, "reference": reference}
    references = []
    for sample in own:
        verdict, reason, reference = _verdict([sample])
        references.append(reference)
        result[verdict] += 1
        if verdict != "right" and (not result["reason"] or verdict == "wrong"):
            result["reason"] = reason
    wrong = [text for text in references if text.startswith("wrong")]
    ran = "right" if "right" in references else references[0]
    return result | {"reference": wrong[0] if wrong else ran}


def _verdict(own: list[Any]) -> tuple[str, str, str]:
    """Verdict and reason on some samples in one model, and what ONNX's reference evaluator says."""
    import torch

    import sam_export as sx
    from scripts.op_coverage_cases import OperatorModel

    def make(dtype: Any) -> sx.TrainStep:
        model = OperatorModel(own).to(dtype)
        sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.01)
        return sx.TrainStep(model, lambda output, _: output, sam, seed=1)

    def batch(dtype: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype)

    eager = make(torch.float32)
    names = [name for name, _ in eager.model.named_parameters()]
    before = [p.detach().clone() for p in eager.model.parameters()]
    result = eager(*batch(torch.float32))
    after = [p.detach().clone() for p in eager.model.parameters()]
    if not bool(result.finite):  # nothing moves, so nothing could be compared
        return "unsupported", "the step is not finite in eager itself", ""
    try:
        step = make(torch.float32)
        captured = sx.capture(step, batch(torch.float32), dynamic=None)
        with tempfile.TemporaryDirectory() as folder:
            artifact = sx.export(captured, Path(folder) / "step", target="onnx")
            session = sx.load(Path(folder) / "step", threads=1)
            found = session.step(*batch(torch.float32))
            state = session.state
            referred = _reference(artifact, [value.numpy() for value in batch(torch.float32)])
    except Exception as error:
        return "unsupported", _line(error), ""
    if not bool(found.finite):
        return "wrong", "the step is not finite, eager's is", ""
    wide: list[torch.Tensor] = []

    def difference(values: Any) -> str:
        """Of which parameter the change is off, and how much; empty where it is right."""
        for index, name in enumerate(names):
            kept = before[index].isfinite()  # an infinite one stays what it is
            value = torch.from_numpy(values[name])
            if not torch.equal(value[~kept], after[index][~kept]):
                return f"{name} is not infinite where it was"
            change = after[index][kept].double() - before[index][kept].double()
            error = float((value[kept].double() - after[index][kept].double()).norm())
            floor = 2e-7 * float(before[index][kept].double().norm())  # w itself is rounded
            if error <= TOLERANCE * float(change.norm()) + floor:
                continue
            if not wide:
                judge = make(torch.float64)
                judge(*batch(torch.float64))
                wide.extend(p.detach() for p in judge.model.parameters())
            own_error = float((after[index].double() - wide[index])[kept].norm())
            if not error <= 10 * own_error + floor:
                relative = error / (float(change.norm()) or 1.0)
                return f"the change of {name} is {relative:.1e} off"
        return ""

    reference = referred if isinstance(referred, str) else difference(referred)
    if not isinstance(referred, str):
        reference = f"wrong: {reference}" if reference else "right"
    off = difference(state)
    if off:
        return "wrong", off, reference
    loss = float(result.loss)
    if not abs(float(found.loss) - loss) <= TOLERANCE * abs(loss) + 1e-6:
        return "wrong", f"the loss is {float(found.loss)}, eager's {loss}", reference
    return "right", "", reference


def _reference(artifact: Any, batch: list[Any]) -> Any:
    """New parameters by ONNX's reference evaluator, or why it cannot run the graph."""
    import numpy as np
    import onnx.reference

    program = artifact.contract.program("step")
    fed = dict(artifact.state())
    fed |= {f"hyper.{hyper.name}": np.array(hyper.defaults) for hyper in artifact.contract.hyper}
    fed |= dict(zip([item.name for item in artifact.contract.batch], batch, strict=True))
    if artifact.details.get("random_numbers"):
        return "not run: the session makes the random numbers"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = onnx.reference.ReferenceEvaluator(str(artifact.file("step")))
            results = evaluator.run(None, {name: fed[name] for name in program.inputs})
    except Exception as error:
        return f"not run: {_line(error)}"
    values = {spec.name: value for spec, value in zip(program.outputs, results, strict=True)}
    return {name: np.asarray(values.get(f"next.{name}", fed[name])) for name in fed}


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith("no ONNX form:"):
        schemas = [line.split("(")[0] for line in lines if "::" in line and "->" in line]
        return "no ONNX form: " + "; ".join(schemas)
    text = lines[0] if lines else ""
    text = text.replace(str(ROOT) + os.sep, "")
    return f"{type(error).__name__}: {text}"[:300]


def work() -> None:
    """A worker: one operator per line of its input, one verdict per line of its output."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = check(order["name"], order["samples"])
        except Exception as error:
            answer = {"name": order["name"], "right": 0, "wrong": 0, "unsupported": 1}
            answer["reason"] = f"in the script: {_line(error)}"
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A process that is started again where it died or took too long."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def ask(self, name: str, count: int) -> dict[str, Any]:
        """The verdict on one operator."""
        if self._process is None:
            command = [sys.executable, "-m", "scripts.op_coverage", "--worker"]
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(TIMEOUT, process.kill)
        timer.start()
        started = time.monotonic()
        print(json.dumps({"name": name, "samples": count}), file=process.stdin, flush=True)
        line = process.stdout.readline()
        timer.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer | {"seconds": round(time.monotonic() - started, 1)}
        self._process = None
        late = time.monotonic() - started >= TIMEOUT
        reason = f"took over {TIMEOUT:.0f} s" if late else f"the process died ({process.wait()})"
        return {"name": name, "right": 0, "wrong": 0, "unsupported": 1, "reason": reason}

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def run(names: list[str], count: int, processes: int, log: Any) -> list[dict[str, Any]]:
    """Verdicts on the operators, in the order of ``names``."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    found: dict[str, dict[str, Any]] = {}

    def serve() -> None:
        worker = Worker(log)
        try:
            while True:
                name = waiting.get_nowait()
                found[name] = worker.ask(name, count)
                print(json.dumps(found[name]), file=sys.stderr, flush=True)
        except queue.Empty:
            pass
        finally:
            worker.close()

    threads = [threading.Thread(target=serve) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[name] for name in names]


def page(results: list[dict[str, Any]], samples: int) -> str:
    """The verdicts as a Markdown page."""
    import onnxruntime
    import torch

    def counted(rows: list[dict[str, Any]]) -> str:
        right = sum(not r["wrong"] and not r["unsupported"] and r["right"] > 0 for r in rows)
        wrong = sum(r["wrong"] > 0 for r in rows)
        some = sum(r["right"] > 0 and not r["wrong"] and r["unsupported"] > 0 for r in rows)
        none = len(rows) - right - wrong - some
        share = 100 * right / len(rows) if rows else 0.0
        return f"{len(rows)} | {right} ({share:.0f} %) | {some} | {none} | {wrong}"

    from scripts.op_coverage_cases import counts_apart

    tried = [r for r in results if r["right"] or r["wrong"] or r["unsupported"]]

    def part(group: str) -> list[dict[str, Any]]:
        return [r for r in tried if counts_apart(r["name"]) == group]

    referred = [str(r.get("reference", "")) for r in tried]
    agree = sum(text == "right" for text in referred)
    differ = [(r["name"], t) for r, t in zip(tried, referred, strict=True) if t.startswith("wrong")]
    lines = [
        "# Operators that train in ONNX",
        "",
        "Made by `scripts/op_coverage`: every differentiable operator of PyTorch's own test",
        f"database, up to {samples} sample inputs each, as a model that goes through one whole SAM",
        "step in ONNX Runtime, against eager (float32).",
        "",
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}.",
        "",
        "| | operators | right | right for some samples | unsupported | wrong |",
        "|---|---:|---:|---:|---:|---:|",
        f"| all but those | {counted(part(''))} |",
        f"| `linalg`, `fft`, `special` and kin | {counted(part('linalg, fft, special'))} |",
        f"| whose calls seed torch's generator | {counted(part('random'))} |",
        "",
        f"{len(results) - len(tried)} more have no sample with real parameters and a real result.",
        "",
        f"ONNX's reference evaluator agrees on {agree} of them, differs on {len(differ)} and",
        f"cannot run {len(tried) - agree - len(differ)}.",
        *(f"- `{name}`: {text}" for name, text in differ),
        "",
        "## Not right",
        "",
        "| operator | right | unsupported | wrong | why |",
        "|---|---:|---:|---:|---|",
    ]
    for row in sorted(tried, key=lambda r: (-r["wrong"], r["name"])):
        if row["wrong"] or row["unsupported"]:
            why = row["reason"].replace("|", "\\|")
            numbers = f"{row['right']} | {row['unsupported']} | {row['wrong']}"
            lines.append(f"| `{row['name']}` | {numbers} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes the verdicts."""
    parser = argparse.ArgumentParser(
        prog="scripts/op_coverage", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ops", help="regular expression of the operators' names")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="sample inputs per operator")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the verdicts as JSON, too")
    parser.add_argument("--page", type=Path, help="where to write the Markdown page")
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    from scripts.op_coverage_cases import operators

    names = [n for n in operators() if not options.ops or re.search(options.ops, n)]
    with tempfile.TemporaryFile("w") as log:
        results = run(names, options.samples, options.processes, log)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.page:
        options.page.write_text(page(results, options.samples))
    wrong = [result["name"] for result in results if result["wrong"]]
    if wrong:
        print(f"wrong: {', '.join(wrong)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
