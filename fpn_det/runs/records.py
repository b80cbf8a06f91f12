"""Files of one JSON object per line: `metrics.jsonl` of evaluations and `training.jsonl` of training steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpn_det.evaluation.evaluate import replaced


def read_records(text: str) -> list[dict[str, Any]]:
    """Parse the lines of such a file. A line that a killed run left incomplete is skipped."""
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class StepRecords:
    """The file `training.jsonl`, which gets a line with every log line of a run.

    Args:
        folder: of the run.
        first_step: after which the run starts or continues. Later lines, which an interrupted run may have written, are removed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._path = folder / "training.jsonl"
        if self._path.is_file():
            earlier = [record for record in read_records(self._path.read_text()) if record["step"] <= first_step]
            with replaced(self._path) as file:
                file.writelines(f"{json.dumps(record)}\n" for record in earlier)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step. What is not finite becomes null."""
        defined = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **defined}) + "\n")
