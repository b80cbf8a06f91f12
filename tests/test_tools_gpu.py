from __future__ import annotations

import runpy

import pytest
import torch
from tiny import ROOT

gpu = runpy.run_path(str(ROOT / "tools" / "gpu.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu_it_ends_in_one_sentence(run_tool):
    result = run_tool("gpu.py")
    assert result.returncode == 2
    assert "expected a CUDA device" in result.stderr and "Traceback" not in result.stderr


def test_figures_are_put_between_the_marks_of_the_page():
    page = (ROOT / "docs" / "gpu.md").read_text()
    figures = gpu["Figures"](
        "Card (80 GiB)",
        {"bf16": {"train_step_s": {"ours": 0.25, "torchvision": 0.5, "ratio": 0.5}}},
        ["scatter"],
        "AP 0.7.",
    )
    once = gpu["put_into"](page, figures.markdown())
    for text in ("Card (80 GiB)", "| bf16 | train_step_s | 0.25 | 0.5 | 0.500 |", "`scatter`", "AP 0.7."):
        assert once.count(text) == 1
    assert gpu["put_into"](once, figures.markdown()) == once  # a second run replaces the first
    assert once.split(gpu["END"])[1] == page.split(gpu["END"])[1]


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="expected the marks"):
        gpu["put_into"]("# A page", "")
