"""``sam-export train``: trains from an artifact alone; an ONNX one needs no torch."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam_export.cli.console import stage
from sam_export.cli.cuda import add_cuda, cuda_arguments, parse_cuda
from sam_export.cli.errors import CommandError
from sam_export.cli.lr_schedule import FORMS, parse_schedule
from sam_export.cli.run_file import DEFAULT_BATCH_SIZE, RunSettings, merge_runs, read_run

if TYPE_CHECKING:
    from sam_export.runtime.session import Session

_EPILOG = """\
examples:
  sam-export train build/digits --data train.npz --epochs 10
  sam-export train build/digits --data train.npz --validate test.npz --epochs 30 \\
      --lr 0.1 --lr-schedule cosine --checkpoint run.ckpt --log metrics.jsonl
  sam-export train build/digits --data train.npz --resume run.ckpt
  sam-export train build/resnet --data my_package.data:training --device cuda

data:
  FILE.npz         arrays named as `sam-export inspect` shows (or arr_0, arr_1, ... in that
                   order), examples along axis 0; shuffled anew in each epoch
  module:function  (or path/file.py:function) returns an iterable of batches and is called for each
                   epoch, with the keyword `epoch` (from 0) if it has such a parameter; a batch is
                   a tuple, or a dict, of NumPy arrays. With --resume it must give the same batches

resuming:
  Run settings are kept beside the checkpoint, in FILE.json: --resume takes them from there and
  continues with the very batch that would have come next. Checkpoint and log are continued.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="train from an artifact",
        description="Trains with the SAM step of an artifact. An ONNX artifact needs ONNX Runtime "
        "and NumPy, and no PyTorch.",
        epilog=_EPILOG,
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder that `export` wrote")
    parser.add_argument(
        "--data", required=True, metavar="DATA", help="FILE.npz or module:function (see below)"
    )
    parser.add_argument("--validate", metavar="DATA", help="evaluated after each epoch, unshuffled")
    parser.add_argument(
        "--average", action="store_true", help="validate and export the averaged weights (EMA)"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="in the whole run; default: 1")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help=f"default: {DEFAULT_BATCH_SIZE}"
    )
    parser.add_argument("--lr", type=float, metavar="X", help="default: as exported")
    parser.add_argument("--lr-schedule", metavar="S", help=f"{FORMS}; default: constant")
    parser.add_argument("--rho", type=float, metavar="X", help="default: as exported")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the order of the data; default: 0"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the runtime's choice")
    parser.add_argument("--checkpoint", metavar="FILE", help="write the training state here")
    parser.add_argument(
        "--checkpoint-every", type=int, default=1, metavar="N", help="epochs; default: 1"
    )
    parser.add_argument("--resume", metavar="FILE", help="continue from this checkpoint")
    parser.add_argument("--log", metavar="FILE", help="write a JSON line for each step here")
    parser.add_argument(
        "--save-state",
        metavar="FILE",
        help="at the end, write parameters, buffers and slots to this .safetensors file",
    )
    parser.add_argument(
        "--export-model",
        metavar="FILE",
        help="at the end, write the model alone, with its weights, to serve it: .onnx from an ONNX "
        "artifact, .pt from torchscript, .pt2 from torch-compile",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of an earlier run that are there"
    )
    add_cuda(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Trains, and says what was written."""
    _check_arguments(args)
    settings = _settings(args)
    schedule = parse_schedule(settings.lr_schedule)
    checkpoint = args.checkpoint or args.resume
    cuda = parse_cuda(args)
    _check_files(args)
    import sam_export
    from sam_export.cli.metrics_log import MetricsLog
    from sam_export.cli.train_data import open_source
    from sam_export.cli.train_loop import TrainLoop

    with stage(f"load {args.artifact}"):
        session = sam_export.load(
            args.artifact, device=args.device, threads=args.threads, cuda=cuda
        )
    _check_hyper(session, settings)
    if args.average and session.contract.ema is None:
        raise CommandError(
            f"--average: the step of {args.artifact} keeps no average of its weights. Give its "
            "TrainStep ema=sam_export.EMA(), and export it again."
        )
    if args.export_model:
        from sam_export.runtime.model_file import check_path

        check_path(session.target, Path(args.export_model))
    if args.resume:
        session.restore(args.resume)
    size, contract = settings.batch_size, session.contract
    data = open_source(args.data, contract, size, settings.seed, training=True)
    validation = args.validate and open_source(args.validate, contract, size, None, training=False)
    settings = _with_examples(settings, data.examples, args)
    _say_start(session, settings, data, validation)
    log = MetricsLog(Path(args.log), session.step_count) if args.log else None
    loop = TrainLoop(
        session=session,
        settings=settings,
        schedule=schedule,
        data=data,
        validation=validation or None,
        checkpoint=Path(checkpoint) if checkpoint else None,
        checkpoint_every=args.checkpoint_every,
        log=log,
        resume_hint=_resume_hint(args),
        average=args.average,
    )
    with log or nullcontext():
        steps = loop.run()
    if steps == 0:
        print(
            f"Nothing to do: {session.step_count} steps are all that {settings.epochs} epochs "
            "have. Give more --epochs."
        )
    if args.save_state:
        _save_state(session, Path(args.save_state))
    if args.export_model:
        session.export_model(args.export_model, average=args.average)
    at_the_end = [args.save_state, args.export_model]
    written = [path for path in ((checkpoint, args.log) if steps else ()) if path]
    written += [path for path in at_the_end if path]
    if written:
        print(f"written: {', '.join(written)}")
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    for name, least in (
        ("epochs", 1),
        ("batch_size", 1),
        ("checkpoint_every", 1),
        ("threads", 1),
        ("seed", 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise CommandError(f"--{name.replace('_', '-')} {value}: at least {least} is needed.")
    for name in ("lr", "rho"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise CommandError(f"--{name} {value}: expected a finite number of at least 0.")


def _settings(args: argparse.Namespace) -> RunSettings:
    names = ("epochs", "batch_size", "seed", "lr", "lr_schedule", "rho")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.resume:
        if not Path(args.resume).is_file():
            raise CommandError(f"--resume {args.resume}: there is no such file.")
        old = read_run(Path(args.resume))
        if old is not None:
            return merge_runs(Path(args.resume), old, given)
        print(
            f"{args.resume} has no run settings beside it ({args.resume}.json): settings come "
            "from the command line, and the place in the data from the step count."
        )
    return RunSettings(**given)


def _with_examples(
    settings: RunSettings, examples: int | None, args: argparse.Namespace
) -> RunSettings:
    resumes = args.resume and read_run(Path(args.resume)) is not None
    if resumes and settings.examples != examples:
        raise CommandError(
            f"{args.resume} was trained on {_count(settings.examples)}; {args.data} has "
            f"{_count(examples)}. Resume with the same data, or start a run without --resume."
        )
    return replace(settings, examples=examples)


def _count(examples: int | None) -> str:
    return "batches from a function" if examples is None else f"{examples} examples"


def _check_files(args: argparse.Namespace) -> None:
    fresh = [args.save_state, args.export_model]
    if not args.resume:
        fresh += [args.checkpoint, args.log]
    elif args.checkpoint and not _same_file(args.checkpoint, args.resume):
        fresh += [args.checkpoint]
    for path in fresh:
        if path and os.path.exists(path) and not args.overwrite:
            raise CommandError(
                f"{path} exists already. Choose another file, continue that run with --resume, or "
                "replace it with --overwrite."
            )


def _same_file(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _check_hyper(session: Session, settings: RunSettings) -> None:
    known = [spec.name for spec in session.contract.hyper]
    scheduled = settings.lr_schedule != "constant"
    wanted = {"lr": settings.lr is not None or scheduled, "rho": settings.rho is not None}
    for name, is_set in wanted.items():
        if is_set and name not in known:
            raise CommandError(f"This step has no {name} to set, only {', '.join(known)}.")


def _say_start(session: Session, settings: RunSettings, data: Any, validation: Any) -> None:
    start = f", from step {session.step_count}" if session.step_count else ""
    print(
        f"{session.contract.optimizer} in SAM, {session.target} on {session.device} by "
        f"{session.provider}: {settings.epochs} epochs of {_count(data.examples)}{start}",
        flush=True,
    )
    for what, source in (("each epoch", data), ("validation", validation)):
        left_out = getattr(source, "left_out", 0)
        if left_out:
            print(f"{what} leaves out {left_out} examples: too few for a batch of this step")


def _resume_hint(args: argparse.Namespace) -> str:
    parts: Sequence[str | None] = (
        *("sam-export", "train", args.artifact, "--data", args.data),
        *(("--validate", args.validate) if args.validate else ()),
        *(("--log", args.log) if args.log else ()),
        *(("--save-state", args.save_state) if args.save_state else ()),
        *(("--export-model", args.export_model) if args.export_model else ()),
        *(("--average",) if args.average else ()),
        *(("--threads", args.threads) if args.threads else ()),
        *(("--device", args.device) if args.device != "cpu" else ()),
        *cuda_arguments(args),
        *("--resume", args.checkpoint or args.resume),
    )
    return shlex.join(str(part) for part in parts)


def _save_state(session: Session, path: Path) -> None:
    from sam_export.artifact.state_file import replace_whole, write_state

    state = session.state
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, lambda partial: write_state(partial, state))
    except OSError as error:
        raise CommandError(f"Cannot write {path}: {error}.") from error
