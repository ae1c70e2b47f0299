"""Result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lavin_rt.files import written_whole


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Writes a record as a result file, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
