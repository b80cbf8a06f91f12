from __future__ import annotations

from fpn_det.runs.best_metric import BestMetric


def test_best_takes_the_larger_value_and_the_earlier_of_equals():
    best = BestMetric("AP")
    assert [best.update(step, {"AP": value}) for step, value in [(1, 0.2), (2, 0.1), (3, 0.3), (4, 0.3)]] == [
        True,
        False,
        True,
        False,
    ]
    assert (best.value, best.step) == (0.3, 3)


def test_best_prefers_anything_to_undefined():
    best = BestMetric("APs")
    assert [best.update(step, {"APs": value}) for step, value in [(1, None), (2, None), (3, 0.0), (4, None)]] == [
        True,
        False,
        True,
        False,
    ]


def test_best_loss_is_the_smallest():
    best = BestMetric("loss")
    assert [best.update(step, {"loss": value}) for step, value in [(1, 0.5), (2, 0.7), (3, 0.3)]] == [True, False, True]
    assert (best.value, best.step, best.misses) == (0.3, 3, 0)


def test_best_counts_evaluations_without_progress():
    best = BestMetric("AP")
    misses = []
    for step, value in enumerate([0.1, 0.14, 0.16, 0.16, None, 0.3], start=1):
        best.update(step, {"AP": value}, min_delta=0.05)
        misses.append(best.misses)
    assert misses == [0, 1, 0, 1, 2, 0]  # 0.14 is less than 0.05 above 0.1; 0.16 is more
    assert best.value == 0.3
