"""Pictures of images above the default of data.max_image_pixels, which that of the settings allows."""

from __future__ import annotations

import pytest
from tiny import TINY

from fpn_det import api
from fpn_det.composition import compose
from fpn_det.data_report.page import write_page
from fpn_det.data_report.report import inspect_data
from fpn_det.image_io import read_for_display


@pytest.fixture
def small_default(monkeypatch):
    """A default below the 96 x 128 px of the images, as if these were large."""
    monkeypatch.setattr(read_for_display, "__defaults__", (100,))


@pytest.mark.usefixtures("small_default")
def test_figures_and_report_of_a_run_show_them(shapes_dataset, tmp_path, capsys):
    run = tmp_path / "run"
    api.train([*TINY, f"data.root={shapes_dataset}", f"run_dir={run}"])
    page = (run / "report" / "index.html").read_text()
    assert "expected at most" not in page and page.count("<img") >= 8
    assert "could not be drawn" not in capsys.readouterr().out


@pytest.mark.usefixtures("small_default")
def test_data_report_shows_them(shapes_dataset, tmp_path):
    report = inspect_data(compose([*TINY, f"data.root={shapes_dataset}"]).data)
    write_page(tmp_path / "page.html", report, None, None)
    page = (tmp_path / "page.html").read_text()
    assert "expected at most" not in page and page.count("<img") >= 8
