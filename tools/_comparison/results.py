"""Results of all runs of a comparison, and the pages that show them."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import markdown  # type: ignore[import-untyped]

from fpn_det.pages.document import write_document


@dataclass(frozen=True)
class Results:
    """All runs of all rows."""

    runs: Sequence[Mapping[str, Any]]
    costs: Mapping[str, Mapping[str, float]]
    versions: Mapping[str, str | None]

    def values(self, row: str, metric: str) -> list[float]:
        """One number per seed, in percent."""
        found = [run["metrics"][metric] for run in self.runs if run["row"] == row]
        return [100 * value for value in found if value is not None]

    def mean(self, row: str, metric: str) -> float:
        """Over seeds, in percent."""
        return statistics.mean(self.values(row, metric))

    def shown(self, row: str, metric: str) -> str:
        """Mean and spread, as in `56.3 ± 0.4`."""
        values = self.values(row, metric)
        if not values:
            return ""
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    def shown_costs(self, row: str) -> list[str]:
        """Parameters, the time of a training step, and that of an image."""
        cost = self.costs[row]
        step = f"{1000 * cost['step_s']:.0f} ms" if "step_s" in cost else ""
        return [f"{cost['parameters'] / 1e6:.1f} M", step, f"{1000 * cost['inference_s']:.0f} ms"]

    def shown_conditions(self) -> str:
        """Versions, and the load of the machine."""
        loads = [run["load"] for run in self.runs]
        return (
            f"torch {self.versions['torch']}, revision {self.versions['git']}, {self.versions['device']}. "
            f"The machine had other work: its load was {statistics.mean(loads):.1f} on average, on {self.runs[0]['cores']} cores. "
            "Therefore times were measured afterwards, of single images and of training steps of 4 images in fp32: on one core, all "
            "rows in alternation, in process time."
        )


def write_page(title: str, parts: Sequence[str], file: Path) -> None:
    """Write `parts` under `title` as Markdown to `file`, and beside it as one HTML file with embedded images."""
    text = "\n\n".join([f"# {title}", *parts]) + "\n"
    file.write_text(text)
    html = markdown.markdown(text, extensions=["tables", "fenced_code"])
    html = html.replace("<table>", '<div class="scroll"><table class="markdown">').replace("</table>", "</table></div>")
    for picture in file.parent.glob(f"{file.stem}_*.[jp][pn]g"):
        data = base64.b64encode(picture.read_bytes()).decode()
        html = html.replace(
            f'src="{picture.name}"', f'src="data:image/{picture.suffix[1:].replace("jpg", "jpeg")};base64,{data}"'
        )
    write_document(file.with_suffix(".html"), title, html)
