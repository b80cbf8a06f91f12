from __future__ import annotations

import pytest

from fpn_det.runs.meters import Pace
from fpn_det.runs.step_lines import ROWS_PER_HEADER, StepLines, clock, loss_text

PARTS = ["rpn_objectness", "rpn_box", "roi_class", "roi_box"]
VALUES = {"loss": 0.51234, **dict.fromkeys(PARTS, 12.3456), "lr": 0.0012345, "images_per_s": 8.14, "grad_norm": 3.0}


def lines_at(width: int, step: int = 1200, total: int = 4800) -> list[str]:
    now = [0.0]
    pace = Pace(0, total, 2, 0, clock=lambda: now[0], steps_per_epoch=400)
    now[0] = step / 2
    return StepLines(width).add(step, VALUES, PARTS, pace)


def test_a_line_of_a_two_stage_detector_fits_80_columns():
    header, line = lines_at(80)
    assert header.split() == "epoch step loss rpn_obj rpn_box roi_cls roi_box lr img/s left".split()
    assert line.split() == ["3/12", "1200/4800", "0.5123", *["12.346"] * 4, "0.00123", "8.1", "0:30:00"]
    ends = [index for index in range(len(header)) if header[index : index + 2].endswith(" ") and header[index] != " "]
    assert all(line[index] != " " and line[index + 1] == " " for index in ends)  # right-aligned below its title
    assert len(header) == len(line) < 80


def test_the_parts_of_all_stages_of_a_cascade_add_up_to_the_loss():
    values = {
        "rpn_box": 0.25,
        "roi_class": 1.0,
        "roi_box": 0.5,
        "roi_class_2": 2.0,
        "roi_box_2": 0.75,
        "roi_class_3": 4.0,
    }
    values |= {"loss": sum(values.values()), "lr": 0.1, "images_per_s": 8.0}
    header, line = StepLines(100).add(1, values, list(values)[:6], Pace(0, 100, 2, 0))
    assert header.split()[1:5] == ["loss", "rpn_box", "roi_cls", "roi_box"]
    assert line.split()[1:5] == ["8.5000", "0.2500", "7.0000", "1.2500"]


@pytest.mark.parametrize("width", [40, 60, 79, 140])
@pytest.mark.parametrize("total", [20, 90_000])
def test_parts_that_do_not_fit_are_left_out_whole(width, total):
    header, line = lines_at(width, step=20, total=total)
    shown = [title for title in header.split() if title.startswith("r")]
    assert shown == ["rpn_obj", "rpn_box", "roi_cls", "roi_box"][: len(shown)]
    assert len(header) == len(line) and (len(line) <= width or not shown)
    assert "  " in line or width < 140


def test_the_header_returns_after_other_text_and_every_so_many_rows():
    lines, pace = StepLines(100), Pace(0, 100, 2, 0)
    counts = [len(lines.add(step, VALUES, PARTS, pace)) for step in range(1, ROWS_PER_HEADER + 2)]
    assert counts == [2, *[1] * (ROWS_PER_HEADER - 1), 2]
    assert len(lines.add(50, VALUES, PARTS, pace)) == 1
    lines.restart()
    assert len(lines.add(60, VALUES, PARTS, pace)) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0000"), (0.51234, "0.5123"), (9.99996, "10.000"), (123.456, "123.46"), (123456.7, "123457"), (1.5e9, "1.5e+09")],
)  # fmt: skip
def test_loss_takes_six_characters(value, text):
    assert loss_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (291.4, "0:04:51"), (97_200, "27:00:00"), (540_000, "6.2 d")]
)
def test_clock_takes_eight_characters(seconds, text):
    assert clock(seconds) == text
