"""Every error that sam_export raises on purpose, one class per stage.

A message says what was asked, what was found, where, and what to do next.
"""

from __future__ import annotations


class SamExportError(Exception):
    """Base of all errors raised by sam_export."""


class StepConfigError(SamExportError, ValueError):
    """The model, loss, optimizer, batch or semantics cannot make a SAM step."""


class CaptureError(SamExportError):
    """The step cannot be traced into one functional graph."""


class LoweringError(SamExportError):
    """The captured step cannot be expressed in the target's form."""


class ArtifactError(SamExportError):
    """A file of an artifact or a checkpoint is missing, damaged, or of another step."""


class RuntimeUnavailableError(SamExportError):
    """The engine, execution provider or device that was asked for is not on this machine."""


class SessionError(SamExportError):
    """A session was fed something that its contract does not allow."""


class ParityError(SamExportError):
    """The parity check could not be carried out (a failed check is a report, not an error)."""
