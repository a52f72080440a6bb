"""Writes a report's file whole or not at all."""

from __future__ import annotations

import os
import tempfile

from sam_export.errors import ParityError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text beside ``path`` and puts it in place.

    Raises:
        ParityError: The file cannot be written.
    """
    folder = os.path.dirname(os.path.abspath(path))
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, prefix=".parity-", delete=False, encoding="utf-8"
        ) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # temporary files are private, a report is not
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise ParityError(
            f"The report cannot be written to {os.fspath(path)}: {error.strerror or error}."
        ) from error
