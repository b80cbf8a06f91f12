"""Ticks, bars, maps and lines."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from compare import assert_close

from fpn_det.pages.charts import bar, bars_are_log, coverage_map, line_chart, linear_ticks, log_ticks


@pytest.mark.parametrize(
    ("ticks", "low", "high", "expected"),
    [
        (log_ticks, 11.3, 300.0, [16, 32, 64, 128, 256]),
        (log_ticks, 0.24, 4.1, [0.25, 0.5, 1, 2, 4]),
        (log_ticks, 30.0, 61.0, [30, 35, 40, 45, 50, 55, 60]),
        (linear_ticks, -0.01, 1.02, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (linear_ticks, 0.28, 0.97, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    ],
)
def test_ticks_are_round(ticks, low, high, expected):
    assert_close(torch.tensor(ticks(low, high)).double(), torch.tensor(expected).double(), 1e-6)


def test_ticks_of_any_range_are_few_and_inside():
    random = np.random.default_rng(0)
    for low, factor in zip(10 ** random.uniform(-2, 4, 200), 1 + 10 ** random.uniform(-2, 4, 200), strict=True):
        for ticks in (linear_ticks, log_ticks):
            found = ticks(low, low * factor)
            assert 3 <= len(found) <= 21 and low <= found[0] and found[-1] <= low * factor


def test_map_counts_the_boxes_over_every_cell():
    random = np.random.default_rng(1)
    sizes = np.array([(60, 120)] * 40)
    first = random.uniform(0, (100, 45), (40, 2))
    boxes = np.concatenate([first, first + random.uniform(1, (20, 15), (40, 2))], axis=1)
    share, aspect = coverage_map(boxes, sizes)
    assert aspect == 0.5 and share.shape == (24, 48)
    for row, column in random.integers(0, (24, 48), (200, 2)):  # cells of 2.5 px
        x, y = column * 2.5, row * 2.5
        over = (boxes[:, 0] < x + 2.5) & (boxes[:, 2] > x) & (boxes[:, 1] < y + 2.5) & (boxes[:, 3] > y)
        assert_close(torch.tensor(share[row, column]), torch.tensor(over.mean()), 1e-9)


def test_bars_show_rare_classes():
    assert bars_are_log([1, 100]) and not bars_are_log([2, 199, 0]) and not bars_are_log([])
    assert "--share:0.1000" in bar(10, 100) and "--share:1.0000" in bar(100, 100, log=True)
    assert "--share:0.1502" in bar(1, 100, log=True)  # log 2 / log 101


def test_lines_start_at_zero_and_end_at_the_largest_value():
    chart = line_chart("a < b", [("loss", [0, 100, 200], [8.0, float("nan"), 2.0]), ("one", [50], [4.0])], top=None)
    assert "a &lt; b" in chart and "a < b" not in chart
    points = re.findall(r'points="([^"]*)"', chart)
    assert points == ["48.0,10.0 448.0,190.0", "148.0,130.0"]  # y: 10 + 240 * (1 - value / 8)
    assert chart.count("<circle") == 1 and re.findall(r">([\d.]+)</text>", chart) == [
        *("0", "50", "100", "150", "200"),
        *("0", "2", "4", "6", "8"),
    ]
