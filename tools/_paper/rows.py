"""Rows of the tables of the paper (Lin et al. 2017) and of its Figure 1, with its numbers on COCO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from _comparison.rows import Row


@dataclass(frozen=True)
class PaperRow(Row):
    """One kind of pyramid, trained and measured in one way.

    Attributes:
        paper: numbers of the paper in percent, by metric.
        quick: part of `quick=true`.
    """

    seeds: int = 3
    paper: Mapping[str, float] = field(default_factory=dict)
    quick: bool = False


def _proposals(letter: str, title: str, paper: tuple[float, ...], quick: bool = False) -> PaperRow:
    names = ("AR100", "AR1000", "ARs1000", "ARm1000", "ARl1000")
    name = f"table1_{letter}"
    return PaperRow(
        name,
        f"({letter}) {title}",
        (f"experiment=paper/{name}", "reduced=proposals"),
        paper=dict(zip(names, paper, strict=True)),
        quick=quick,
    )


def _detector(letter: str, title: str, paper: tuple[float, ...], *settings: str, quick: bool = False) -> PaperRow:
    names = ("AP50", "AP", "APs", "APm", "APl")
    name = f"table3_{letter}"
    settings = (f"experiment=paper/{name}", "reduced=detector", *settings)
    return PaperRow(name, f"({letter}) {title}", settings, paper=dict(zip(names, paper, strict=True)), quick=quick)


PROPOSALS = (
    _proposals("a", "one map, C4", (36.1, 48.3, 32.0, 58.7, 62.2)),
    _proposals("b", "one map, C5", (36.3, 44.9, 25.3, 55.5, 64.2), quick=True),
    _proposals("c", "FPN", (44.0, 56.3, 44.9, 63.4, 66.2), quick=True),
    _proposals("d", "bottom-up: no top-down pathway", (37.4, 49.5, 30.5, 59.9, 68.0), quick=True),
    _proposals("e", "top-down only: no lateral connections", (34.5, 46.1, 26.5, 57.4, 64.7)),
    _proposals("f", "finest level only", (38.4, 51.3, 35.1, 59.7, 67.6)),
)

# The head of He et al. for C4, all of conv5, costs as much per box as the backbone does per image.
TWO_LAYERS = "roi_head=two_layer"
SCALES = "[0.5,1,2]"

DETECTORS = (
    _detector("a", "one map, C4", (53.1, 31.6, 13.2, 35.6, 47.1), TWO_LAYERS),
    _detector("b", "one map, C5", (51.7, 28.0, 9.6, 31.9, 43.1), quick=True),
    _detector("c", "FPN", (56.9, 33.9, 17.8, 37.7, 45.8), quick=True),
    PaperRow(
        "feature_hierarchy",
        "feature hierarchy, as SSD's",
        ("experiment=paper/table3_c", "neck=feature_hierarchy", "reduced=detector"),
    ),
    PaperRow(
        "image_pyramid",
        "image pyramid: (a) at three scales",
        (f"model.image_pyramid.test={SCALES}",),
        weights_of="table3_a",
    ),
    PaperRow(
        "image_pyramid_trained",
        "image pyramid, trained: at the three scales too",
        (
            "experiment=paper/table3_a",
            "reduced=detector",
            TWO_LAYERS,
            f"model.image_pyramid.test={SCALES}",
            f"model.image_pyramid.train={SCALES}",
        ),
        seeds=1,
    ),
)
