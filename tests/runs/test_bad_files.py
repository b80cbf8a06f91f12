from __future__ import annotations

from pathlib import Path

import pytest

from fpn_det.image_io import BadImage
from fpn_det.runs.bad_files import BadFiles, read_bad_files


def test_each_bad_file_is_logged_and_listed_once_also_after_a_resume(tmp_path):
    logged: list[str] = []
    for _ in range(2):
        count = BadFiles(tmp_path, 40, 0.1, logged.append)
        for name in ("a.jpg", "b.jpg", "a.jpg"):
            count(BadImage(Path(name), f"{name}: torn"))
    assert logged == ["skipped: a.jpg: torn", "skipped: b.jpg: torn"]
    assert read_bad_files(tmp_path) == ["a.jpg\ta.jpg: torn", "b.jpg\tb.jpg: torn"]


def test_too_many_bad_files_end_the_run(tmp_path):
    count = BadFiles(tmp_path, 40, 0.05, lambda text: None)
    count(BadImage(Path("a.jpg"), "torn"))
    count(BadImage(Path("b.jpg"), "torn"))  # two of 40 are 5 %
    with pytest.raises(ValueError, match=r"at most 0\.05 of 40 images to be bad, got 3, listed in .*bad_files\.txt"):
        count(BadImage(Path("c.jpg"), "torn"))
    assert len(read_bad_files(tmp_path)) == 3
