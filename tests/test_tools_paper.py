from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from _comparison import runs
from _comparison.results import Results
from _comparison.runs import finish, jobs_of
from _paper import page
from _paper.rows import DETECTORS, PROPOSALS
from fpn_det.cli.arguments import fit_words
from fpn_det.composition import compose
from paper import Options

ROWS = {row.name: row for row in (*PROPOSALS, *DETECTORS)}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.weights_of is None])
def test_every_row_composes_at_a_small_scale(name):
    settings = compose(list(ROWS[name].settings))
    assert settings.model["backbone"]["depth"] == 18 and settings.trainer.max_steps < 2000
    metrics = page.PROPOSAL_METRICS if name.startswith("table1") else page.DETECTION_METRICS
    assert set(metrics) <= set(settings.evaluation.metric_names)


def test_rows_that_need_weights_name_a_row_that_has_them():
    for row in ROWS.values():
        if row.weights_of:
            assert ROWS[row.weights_of].weights_of is None
            compose([*ROWS[row.weights_of].settings, *row.settings])


def test_every_row_is_started_before_any_second_seed(tmp_path):
    jobs = jobs_of(ROWS.values(), 3, tmp_path)
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    assert len(jobs) == sum(row.seeds for row in ROWS.values()) and len({job.folder for job in jobs}) == len(jobs)


def test_what_is_finished_is_not_done_again(tmp_path):
    jobs = jobs_of([ROWS["table1_b"]], 2, tmp_path)
    for job in jobs:
        job.folder.mkdir(parents=True)
        job.result_file.write_text(json.dumps({"seed": job.seed}))
    assert finish(jobs, ("data.root=nowhere",), 2, print) == [{"seed": 0}, {"seed": 1}]


def test_a_failed_run_raises_its_message(tmp_path):
    with pytest.raises(RuntimeError, match="nowhere"):
        finish(jobs_of([ROWS["table1_b"]], 1, tmp_path), ("data.root=nowhere",), 1, print)


def results(numbers: dict[str, list[float]]) -> Results:
    found = [{"row": row, "metrics": {"AP": value}} for row, values in numbers.items() for value in values]
    return Results(found, {}, {})


@pytest.mark.parametrize(
    ("better", "worse", "difference", "verdict"),
    [
        ([0.5, 0.6], [0.3, 0.4], 20.0, "every seed above every seed"),
        ([0.5, 0.6], [0.3, 0.55], 12.5, "seeds overlap"),
        ([0.3, 0.5], [0.4, 0.6], -10.0, "seeds overlap"),
        ([0.3, 0.4], [0.5, 0.6], -20.0, "**no**"),
    ],
)
def test_a_claim_is_compared_over_all_seeds(better, worse, difference, verdict):
    claim = page.Claim("", "a", "b", "AP")
    found, words = page.compare_seeds(results({"a": better, "b": worse}), claim)
    assert found == pytest.approx(difference) and verdict in words


def test_numbers_are_shown_with_their_spread():
    # mean 0.5, deviations -0.1, 0, 0.1: standard deviation 0.1
    assert results({"a": [0.4, 0.5, 0.6]}).shown("a", "AP") == "50.0 ± 10.0"
    assert results({"a": [0.4]}).shown("a", "AP") == "40.0"


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("seed=2", "Did you mean seeds?"),
        ("quick", "expected name=value"),
        ("precision=fp8", "expected one of fp32 or bf16"),
    ],
)
def test_a_wrong_command_line_is_refused(word, words):
    with pytest.raises(ValueError) as refusal:
        fit_words([word], Options)
    assert words in str(refusal.value)


@pytest.mark.slow
def test_the_quick_list_ends_with_pages_and_is_not_trained_again(run_tool, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SHAPES", (*runs.SHAPES, "--train", "8", "--val", "8"))
    words = ["quick=true", "data=shapes", "output=pages", "trainer.max_steps=1", "data.num_workers=0", "precision=fp32"]
    first = run_tool("paper.py", *words)
    assert first.returncode == 0, first.stderr
    page = (tmp_path / "pages" / "paper_quick.md").read_text()
    assert (
        "FPN" in page
        and "too little to rank the rows" in page
        and "data:image/png" in (tmp_path / "pages" / "paper_quick.html").read_text()
    )
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "paper").rglob("*.pt")}
    assert made and run_tool("paper.py", *words).returncode == 0
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "paper").rglob("*.pt")}
