"""``sam-export parity``: is every target's step the eager step?"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from sam_export.cli.console import PhaseBars, stage
from sam_export.cli.dynamic import add_dynamic, parse_dynamic
from sam_export.cli.errors import CommandError
from sam_export.cli.recipe import add_recipe, first_batches, load_recipe
from sam_export.runtime.detect import TARGETS, target_status

_EPILOG = """\
examples:
  sam-export parity models/digits_cnn.py:recipe --targets onnx --steps 20
  sam-export parity models/mlp.py:recipe --targets torch-compile,onnx --json parity.json
  sam-export parity models/mlp.py:recipe --set dtype=float64 --targets torch-compile
  sam-export parity models/mlp.py:recipe --targets onnx --html parity.html --markdown parity.md

exit codes: 0 equal; 1 different; 2 could not compare
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "parity",
        help="compare targets with eager PyTorch, step by step",
        description="Runs the step of a recipe on each target and in plain eager PyTorch, from the "
        "same start and on the same batches, and compares losses, gradient norms and the change of "
        "every parameter, buffer and optimizer slot.",
        epilog=_EPILOG,
    )
    add_recipe(parser)
    parser.add_argument(
        "--targets",
        default=",".join(TARGETS),
        metavar="A,B",
        help=f"which targets, of {', '.join(TARGETS)} (default: all)",
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    add_dynamic(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    parser.add_argument("--html", metavar="FILE", help="also write it as one HTML page")
    parser.add_argument("--markdown", metavar="FILE", help="also write it for a pull request")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compares, prints the report, and returns 0 when all is equal."""
    targets = parse_targets(args.targets)
    dynamic = parse_dynamic(args.dynamic)
    if args.steps < 1:
        raise CommandError(f"--steps {args.steps}: at least 1 is needed.")
    for target in targets:
        status = target_status(target)
        if missing := (*status.export, *status.run):
            advice = "; ".join(dict.fromkeys(item.install for item in missing))
            whats = ", ".join(dict.fromkeys(item.what for item in missing))
            raise CommandError(f"Comparing {target} needs {whats}. Install: {advice}.")
    for path in filter(None, (args.json, args.html, args.markdown)):
        if not Path(path).absolute().parent.is_dir():
            raise CommandError(f"{path} cannot be written: its folder does not exist. Make it.")
    import sam_export

    with stage(f"recipe {args.recipe}"):
        step, batches = load_recipe(args.recipe, args.settings)
        taken = first_batches(args.recipe, batches, args.steps)
    label = f"{args.steps} steps of eager and {', '.join(targets)}"
    with stage(label, spin=False), PhaseBars() as bars:
        report = sam_export.check_parity(
            step,
            taken,
            targets=targets,
            num_steps=args.steps,
            device=args.device,
            progress=bars.show,
            dynamic=dynamic,
            command=shlex.join(["sam-export", *args.argv]),
        )
    print(report)
    from sam_export.report.parity_html import write_html
    from sam_export.report.parity_markdown import write_markdown

    for path, write in (
        (args.json, type(report).to_json),
        (args.html, write_html),
        (args.markdown, write_markdown),
    ):
        if path:
            write(report, path)
            print(f"written: {path}")
    return 0 if report.ok else 1


def parse_targets(text: str) -> list[str]:
    """The targets of a comma-separated list.

    Raises:
        CommandError: One of them is unknown, or given twice, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in TARGETS]
    if not names or unknown or len(set(names)) != len(names):
        raise CommandError(
            f"--targets {text!r}: expected names out of {', '.join(TARGETS)}, each once, with "
            "commas between them."
        )
    return names
