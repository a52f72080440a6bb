"""``sam-export export``: a recipe to an artifact."""

from __future__ import annotations

import argparse
import os
from typing import Any

from sam_export.cli.console import format_bytes, stage
from sam_export.cli.dynamic import add_dynamic, parse_dynamic
from sam_export.cli.errors import CommandError
from sam_export.cli.recipe import add_recipe, first_batches, load_recipe
from sam_export.runtime.detect import TARGETS, target_status

_EPILOG = """\
examples:
  sam-export export models/digits_cnn.py:recipe --target onnx --out build/digits
  sam-export export my_package.recipes:resnet --out build/resnet --set depth=18 --set lr=0.1
  sam-export export models/gpt.py:recipe --out build/gpt --dynamic x.0=b,x.1=t,target.0=b,target.1=t
  sam-export export models/mlp.py:recipe --target torch-compile --out build/mlp --overwrite
  sam-export export models/mlp.py:recipe --target onnx --device cuda --out build/mlp
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="write the SAM step of a recipe as an artifact",
        description="Captures the SAM step that a recipe returns and writes it as an artifact: a "
        "folder with the step, its contract and the initial state. The first batch is the example.",
        epilog=_EPILOG,
    )
    add_recipe(parser)
    parser.add_argument(
        "--target",
        choices=list(TARGETS),
        default="onnx",
        metavar="TARGET",
        help=f"of {', '.join(TARGETS)} (default: onnx)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the artifact in DIR")
    add_dynamic(parser)
    parser.add_argument(
        "--dynamic-hyper",
        metavar="A,B",
        default="",
        help="options of the base optimizer that can change from step to step, besides lr and rho: "
        "weight_decay,momentum",
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="what the artifact is for (default: cpu): aot-inductor compiles for it, the ONNX "
        "targets write a step that stays on it; torchscript and torch-compile run on either",
    )
    parser.add_argument(
        "--return-outputs", action="store_true", help="each step also returns the model's outputs"
    )
    parser.add_argument(
        "--staged",
        action="store_true",
        help="also the step in three stages (ascent, descent, update), between which gradients can "
        "be accumulated or averaged between machines",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Exports, and says what was written."""
    if os.path.lexists(args.out) and not args.overwrite:
        raise CommandError(f"{args.out} exists already. Choose another folder, or --overwrite.")
    dynamic = parse_dynamic(args.dynamic)
    require_export(args.target)
    import sam_export

    with stage(f"recipe {args.recipe}"):
        step, batches = load_recipe(args.recipe, args.settings)
        (example,) = first_batches(args.recipe, batches, 1)
    with stage("capture"):
        captured = sam_export.capture(
            step,
            example,
            dynamic=dynamic,
            return_outputs=args.return_outputs,
            staged=args.staged,
            dynamic_hyper=[name.strip() for name in args.dynamic_hyper.split(",") if name.strip()],
        )
    with stage(f"lower to {args.target} and write"):
        artifact = sam_export.export(
            captured,
            args.out,
            target=args.target,
            overwrite=args.overwrite,
            device=args.device,
        )
    programs = ", ".join(program.name for program in artifact.contract.programs)
    print(f"{artifact.path}: {artifact.target}, programs {programs}, {format_bytes(artifact.size)}")
    print(f"look at it:  sam-export inspect {args.out}")
    print(f"train:       sam-export train {args.out} --data DATA.npz")
    return 0


def require_export(target: str) -> None:
    """Stops with what is missing when this machine cannot export to ``target``.

    Raises:
        CommandError: Something is missing; the message has the command that installs it.
    """
    missing = target_status(target).export
    if missing:
        whats = ", ".join(item.what for item in missing)
        installs = "; ".join(dict.fromkeys(item.install for item in missing))
        raise CommandError(f"Exporting to {target} needs {whats}. Install: {installs}.")
