"""``python -m sam_export`` is ``sam-export``."""

from __future__ import annotations

import sys

from sam_export.cli import main

sys.exit(main())
