from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))


from tiny import TINY

from _comparison import runs
from _comparison.results import Results
from _comparison.rows import Row
from _recipes import rows as recipe_rows
from _recipes.page import change, rows_of, seed_deviation
from _recipes.rows import Table, tables
from fpn_det.composition import compose
from fpn_det.training.config import TrainConfig

TABLES = tables(Path("bccd"), Path("shapes"), 2)
VARIANTS = [(table, row) for table in TABLES for row in table.rows if row is not table.base]


def settings_of(table: Table, row: Row) -> TrainConfig:
    return compose([*(table.base.settings if row.weights_of else ()), *row.settings])


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_base_has_no_ingredient(table):
    settings = settings_of(table, table.base)
    assert settings.trainer.ema is None and settings.model["roi_head"]["_target_"].endswith(".ROIHead")
    assert settings.optimizer["layer_decay"] == 1 and settings.model["roi_head"]["cls_loss"]["label_smoothing"] == 0
    assert set(table.metrics) <= set(settings.evaluation.metric_names)


@pytest.mark.parametrize(("table", "row"), VARIANTS, ids=[row.name for _, row in VARIANTS])
def test_a_variant_differs_from_its_base_in_its_words_only(table, row):
    assert table.words(row) and settings_of(table, row) != settings_of(table, table.base)
    assert row.weights_of or row.settings[: len(table.base.settings)] == table.base.settings


def test_the_names_of_rows_are_unique():
    names = [row.name for table in TABLES for row in table.rows]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("base", "values", "deviation", "text"),
    [
        ([50.0, 51.0], [53.0, 54.0], 0.5, "+3.0 ± 0.5"),  # 0.5 * sqrt(1/2 + 1/2)
        ([50.0, 51.0], [48.0], 2.0, "-2.5 ± 2.4"),  # 2 * sqrt(1/2 + 1)
        ([50.0], [53.0], None, "+3.0, too few seeds"),
        ([], [53.0], 1.0, ""),
    ],
)
def test_a_change_is_told_with_its_standard_error(base, values, deviation, text):
    assert change(base, values, deviation) == text


def test_the_deviation_over_seeds_is_pooled_over_rows():
    # squares of 1 + 1 with one degree of freedom, and of 4 + 0 + 4 with two
    assert seed_deviation([[50.0, 52.0], [60.0], [40.0, 42.0, 44.0], []]) == pytest.approx((10 / 3) ** 0.5)
    assert seed_deviation([[50.0], []]) is None


def test_a_table_shows_what_was_measured_and_nothing_else():
    table = TABLES[1]
    cost = {"parameters": 2e6, "step_s": 0.5, "inference_s": 0.1}
    results = Results(
        [{"row": "scratch_base", "metrics": dict.fromkeys(table.metrics, 0.5)}], {"scratch_base": cost}, {}
    )
    lines = rows_of(results, table).splitlines()
    assert len(lines) == 3 and lines[2] == "| **base** |  | 1 | 50.0 | 50.0 | 50.0 |  | 2.0 M | 500 ms | 100 ms |"


def test_a_missing_data_set_is_refused_with_its_source(run_tool):
    refused = run_tool("recipes.py", "bccd=nowhere")
    assert refused.returncode == 2 and "Shenggan/BCCD_Dataset" in refused.stderr


@pytest.mark.slow
def test_finished_rows_make_a_page_and_are_not_trained_again(run_tool, tmp_path, monkeypatch, shapes_dataset):
    base = Row("t_base", "base", (*TINY, f"data.root={shapes_dataset}", "trainer.max_steps=1"), 1)
    filtered = ("model.roi_head.test_filter._target_=fpn_det.models.selection.SoftDetectionFilter",)
    rows = (
        base,
        Row("t_ema", "average", (*base.settings, "trainer.ema=0.9"), 1),
        Row("t_soft", "Soft-NMS", filtered, 1, "t_base"),
    )
    table = Table("t", "Title of the table", "Text.", ("AP", "AP50"), rows)
    monkeypatch.setattr(recipe_rows, "tables", lambda bccd, shapes, seeds: (table,))
    monkeypatch.setattr(runs, "SHAPES", (*runs.SHAPES, "--train", "8", "--val", "8"))
    (tmp_path / "bccd" / "JPEGImages").mkdir(parents=True)
    words = ["bccd=bccd", "shapes=drawn", "seeds=1", "output=pages", f"data.root={shapes_dataset}"]
    first = run_tool("recipes.py", *words, "precision=fp32")
    assert first.returncode == 0, first.stderr
    page = (tmp_path / "pages" / "recipes.md").read_text()
    assert all(f"**{row.title}**" in page for row in rows) and "Not measured yet" not in page
    assert "data:image/png" in (tmp_path / "pages" / "recipes.html").read_text()
    found = json.loads((tmp_path / "pages" / "recipes.json").read_text())
    assert [run["row"] for run in found["runs"]] == ["t_base", "t_ema", "t_soft"]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "recipes").rglob("*.pt")}
    assert made and run_tool("recipes.py", *words, "train=false").returncode == 0
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "recipes").rglob("*.pt")}
