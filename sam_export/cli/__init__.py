"""The command line, `sam-export`: one module per command, loaded when it is called."""

from __future__ import annotations

from sam_export.cli.app import main

__all__ = ["main"]
