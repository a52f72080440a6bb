"""``sam-export parity``: is every target's step the eager step?"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sam_export.cli import parity_self_test
from sam_export.cli.console import PhaseBars, stage
from sam_export.cli.cuda import add_cuda, cuda_arguments, parse_cuda
from sam_export.cli.dynamic import add_dynamic, parse_dynamic
from sam_export.cli.errors import CommandError
from sam_export.cli.parity_locate import add_locate, check_locate, failed_steps, run_locate
from sam_export.cli.parity_subjects import (
    add_subjects,
    checked,
    chosen_targets,
    parse_targets,
    subjects,
)
from sam_export.cli.recipe import add_recipe, first_batches, load_recipe
from sam_export.runtime.cuda_options import CudaOptions

_EPILOG = """\
examples:
  sam-export parity models/digits_cnn.py:recipe --targets onnx --steps 20
  sam-export parity models/mlp.py:recipe --targets torch-compile,onnx --json parity.json
  sam-export parity models/mlp.py:recipe --set dtype=float64 --targets torch-compile
  sam-export parity models/mlp.py:recipe --artifact build/mlp
  sam-export parity models/mlp.py:recipe --targets onnx --reference loops.py:my_loop
  sam-export parity --self-test --targets onnx
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
    add_recipe(parser, optional=True)
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="no recipe: put known faults into the targets, and check that each one is found",
    )
    add_subjects(parser)
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--stages",
        action="store_true",
        help="also compare both gradients and the perturbation of every parameter, on an artifact "
        "of each target that returns them",
    )
    add_dynamic(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    parser.add_argument("--html", metavar="FILE", help="also write it as one HTML page")
    parser.add_argument("--markdown", metavar="FILE", help="also write it for a pull request")
    add_locate(parser)
    add_cuda(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Compares, prints the report, and returns 0 when all is equal."""
    dynamic = parse_dynamic(args.dynamic)
    check_locate(args.locate, args.device)
    cuda = parse_cuda(args)
    if cuda is not None and not args.device.startswith("cuda"):
        raise CommandError(
            f"{shlex.join(cuda_arguments(args))} with --device {args.device}: give --device cuda, "
            "or leave it out."
        )
    if args.steps < 1:
        raise CommandError(f"--steps {args.steps}: at least 1 is needed.")
    if args.targets is not None:
        checked(parse_targets(args.targets))  # before the recipe, which may take long
    if args.self_test:
        if args.recipe is not None:
            raise CommandError(
                f"--self-test has models of its own; leave out the recipe {args.recipe!r}, or "
                "leave out --self-test to compare its step."
            )
        given = {
            "--set": args.settings,
            "--artifact": args.artifacts,
            "--reference": args.reference,
            "--locate": args.locate,
            shlex.join(cuda_arguments(args)): cuda,
            "--html": args.html,
            "--markdown": args.markdown,
        }
        if others := [name for name, value in given.items() if value]:
            raise CommandError(f"--self-test takes --targets and --json, not {', '.join(others)}.")
        return parity_self_test.run(chosen_targets(args, "torch.float32"), args.json)
    if args.recipe is None:
        raise CommandError(
            "There is nothing to compare: give a RECIPE, such as models/mlp.py:recipe, or "
            "--self-test to test the check itself."
        )
    for path in filter(None, (args.json, args.html, args.markdown)):
        if not Path(path).absolute().parent.is_dir():
            raise CommandError(f"{path} cannot be written: its folder does not exist. Make it.")
    with _without_tf32() if args.device.startswith("cuda") and not args.tf32 else nullcontext():
        return _compared(args, dynamic, cuda)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """cuDNN rounds convolutions to TF32 by default, which eager on the CPU does not.

    NVIDIA's libraries read this variable when they start, in the processes of ``isolate``, too.
    """
    if "NVIDIA_TF32_OVERRIDE" in os.environ:
        yield
        return
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    try:
        yield
    finally:
        del os.environ["NVIDIA_TF32_OVERRIDE"]


def _compared(args: argparse.Namespace, dynamic: Any, cuda: CudaOptions | None) -> int:
    import sam_export
    from sam_export.parity.subjects import with_unseen_size

    with stage(f"recipe {args.recipe}"):
        step, batches = load_recipe(args.recipe, args.settings)
        taken = first_batches(args.recipe, batches, args.steps)
    chosen = subjects(args, str(next(step.model.parameters()).dtype))
    label = (
        f"{args.steps} steps of eager and {', '.join([*chosen['artifacts'], *chosen['targets']])}"
    )
    with stage(label, spin=False), PhaseBars() as bars:
        report = sam_export.check_parity(
            step,
            taken,
            num_steps=args.steps,
            device=args.device,
            progress=bars.show,
            dynamic=dynamic,
            command=shlex.join(["sam-export", *args.argv]),
            stages=args.stages,
            cuda=cuda,
            **chosen,
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
    if report.interrupted:
        return 2
    if args.locate and not report.ok:
        if dynamic == "batch":
            taken = with_unseen_size(taken, args.steps)
        failed = failed_steps(report, chosen["artifacts"])
        run_locate(step, taken, failed, args.locate, dynamic)
    return 0 if report.ok else 1
