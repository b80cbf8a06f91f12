"""The pages: our numbers beside those of the paper, from the saved results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from _comparison.results import Results, write_page
from _paper.rows import PaperRow

PROPOSAL_METRICS = {"AR100": "AR100", "AR1000": "AR1000", "ARs1000": "small", "ARm1000": "medium", "ARl1000": "large"}
DETECTION_METRICS = {"AP": "AP", "AP50": "AP50", "APs": "small", "APm": "medium", "APl": "large"}
SIZES = ("small", "medium", "large")
NAMES = PROPOSAL_METRICS | DETECTION_METRICS
TEXTS = Path(__file__).parent


def table(results: Results, rows: Sequence[PaperRow], metrics: Mapping[str, str]) -> str:
    """Our numbers, and those of the paper in a second line of each row."""
    costs = ["parameters", "training step", "image"]
    lines = [["", "seeds", *metrics.values(), *costs], ["---", *["---:"] * (1 + len(metrics) + len(costs))]]
    for row in rows:
        numbers = [results.shown(row.name, metric) for metric in metrics]
        seeds = str(len(results.values(row.name, next(iter(metrics)))))
        lines.append([f"**{row.title}**", seeds, *numbers, *results.shown_costs(row.name)])
        if row.paper:
            lines.append(
                [
                    "in the paper",
                    "",
                    *(f"*{row.paper[metric]}*" if metric in row.paper else "" for metric in metrics),
                    "",
                    "",
                    "",
                ]
            )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@dataclass(frozen=True)
class Claim:
    """A finding of the paper: one row is better than another."""

    text: str
    better: str
    worse: str
    metric: str


CLAIMS = (
    Claim("FPN proposes better than C4", "table1_c", "table1_a", "AR1000"),
    Claim("... small objects", "table1_c", "table1_a", "ARs1000"),
    Claim("... medium objects", "table1_c", "table1_a", "ARm1000"),
    Claim("... large objects", "table1_c", "table1_a", "ARl1000"),
    Claim("FPN proposes better than C5", "table1_c", "table1_b", "AR1000"),
    Claim("... small objects", "table1_c", "table1_b", "ARs1000"),
    Claim("... medium objects", "table1_c", "table1_b", "ARm1000"),
    Claim("... large objects", "table1_c", "table1_b", "ARl1000"),
    Claim("A top-down pathway is needed: against bottom-up", "table1_c", "table1_d", "AR1000"),
    Claim("Lateral connections are needed: against top-down only", "table1_c", "table1_e", "AR1000"),
    Claim("A pyramid is needed: against the finest level only", "table1_c", "table1_f", "AR1000"),
    Claim("FPN detects better than C4", "table3_c", "table3_a", "AP"),
    Claim("... small objects", "table3_c", "table3_a", "APs"),
    Claim("FPN detects better than C5", "table3_c", "table3_b", "AP"),
    Claim("FPN detects better than the feature hierarchy", "table3_c", "feature_hierarchy", "AP"),
    Claim("... small objects", "table3_c", "feature_hierarchy", "APs"),
    Claim("FPN detects better than the image pyramid", "table3_c", "image_pyramid", "AP"),
    Claim("... than that trained at all its scales", "table3_c", "image_pyramid_trained", "AP"),
)


def compare_seeds(results: Results, claim: Claim) -> tuple[float, str]:
    """The difference of the means in points, and the verdict: yes if every seed agrees with the claim."""
    better, worse = results.values(claim.better, claim.metric), results.values(claim.worse, claim.metric)
    difference = statistics.mean(better) - statistics.mean(worse)
    if min(better) > max(worse):
        return difference, "yes, every seed above every seed"
    return difference, "**no**" if max(better) < min(worse) else "**undecided**, seeds overlap"


def claims_table(results: Results, rows: Mapping[str, PaperRow]) -> str:
    """The findings of the paper, with the differences in the paper and here."""
    lines = ["| finding | points of | in the paper | here | reproduced? |", "| --- | --- | ---: | ---: | --- |"]
    for claim in CLAIMS:
        better, worse = (rows[name].paper for name in (claim.better, claim.worse))
        theirs = (
            f"{better[claim.metric] - worse[claim.metric]:+.1f}"
            if claim.metric in better and claim.metric in worse
            else ""
        )
        ours, verdict = compare_seeds(results, claim)
        lines.append(f"| {claim.text} | {NAMES[claim.metric]} | {theirs} | {ours:+.1f} | {verdict} |")
    return "\n".join(lines)


def write_pages(results: Results, proposals: Sequence[PaperRow], detectors: Sequence[PaperRow], file: Path) -> None:
    """Write `file` as Markdown, and beside it one HTML file with embedded images."""
    rows = {row.name: row for row in (*proposals, *detectors)}
    is_whole = all(claim.better in rows and claim.worse in rows for claim in CLAIMS)
    parts = [
        (TEXTS / "introduction.md").read_text().strip(),
        "## Proposals (Table 1)",
        "The RPN alone; average recall in percent, by the number of proposals and by the size of objects (among 1000 proposals).",
        table(results, proposals, PROPOSAL_METRICS),
        f"![recall by size]({file.stem}_proposals.png)",
        "## Detection (Table 3 and Figure 1)",
        "Faster R-CNN; average precision in percent.",
        table(results, detectors, DETECTION_METRICS),
        f"![precision by size]({file.stem}_detection.png)",
    ]
    if is_whole:
        seconds = {name: cost["inference_s"] for name, cost in results.costs.items()}
        one, pyramid, fpn = (seconds[name] for name in ("table3_a", "image_pyramid", "table3_c"))
        parts += [
            f'"Inference time increases considerably": the image pyramid takes {pyramid / one:.1f} times as long as the same detector on '
            f"one scale, and {pyramid / fpn:.1f} times as long as the FPN."
        ]
        parts += ["## Findings of the paper", claims_table(results, rows), (TEXTS / "notes.md").read_text().strip()]
    else:
        parts += ["One seed of some rows: enough to test the tool, too little to rank the rows."]
    parts += [
        "## Feature maps of each pyramid",
        "One image, and the norm of the feature vector in every cell of every level (of the first seed; each map stretched "
        "from its smallest to its largest value).",
        f"![feature maps]({file.stem}_maps.jpg)",
        "## How it was measured",
        results.shown_conditions(),
    ]
    write_page("The pyramids of the FPN paper, side by side", parts, file)
