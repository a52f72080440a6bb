"""Parses the command line, runs one command, and turns what it raises into an exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
from collections.abc import Sequence

from sam_export._version import __version__
from sam_export.cli import export, inspect, parity, targets, train
from sam_export.cli.errors import Interrupted, report_error

COMMANDS = (export, inspect, train, parity, targets)
"""The commands in the order of the help; each has ``add_parser`` and ``run``."""

_HELP_WIDTH = 79

_EPILOG = """\
examples:
  sam-export targets
  sam-export export models/digits_cnn.py:recipe --target onnx --out build/digits
  sam-export inspect build/digits
  sam-export train build/digits --data train.npz --epochs 10
  sam-export parity models/digits_cnn.py:recipe --targets torch-compile,onnx

exit codes: 0 done; 1 the parity check found a difference; 2 an error; 130 interrupted
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; it imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="sam-export",
        description="One whole SAM training step of a PyTorch model as one graph: export it,\n"
        "look at it, train with it, and prove that it equals eager PyTorch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sam-export {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = command.add_parser(commands)
        subparser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the examples
        subparser.description = textwrap.fill(subparser.description or "", _HELP_WIDTH)
        subparser.add_argument(
            "--traceback", action="store_true", help="show the traceback of an error"
        )
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code (see ``sam-export --help``).
    """
    args = make_parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return int(code)
    except Interrupted as stopped:
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader went away (`| head`): say nothing, also not when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        report_error(error, args.traceback)
        return 2
