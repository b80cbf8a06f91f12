"""Pages and their parts."""

from __future__ import annotations

import numpy as np

from fpn_det.pages.document import cell, hint, keys, picture, table, write_document


def test_texts_of_files_cannot_become_tags(tmp_path):
    write_document(
        tmp_path / "page.html", "<b>", table(["<i>"], [[cell("<u>")]]) + hint("<s>") + keys([("<q>", "red")])
    )
    page = (tmp_path / "page.html").read_text()
    for tag in ("<b>", "<i>", "<u>", "<s>", "<q>"):
        assert tag not in page and tag.replace("<", "&lt;").replace(">", "&gt;") in page
    assert 'alt="&quot;"' in picture(np.zeros((2, 3, 3), np.uint8), '"')


def test_cells_have_three_digits():
    assert [cell(None), cell(0.12345), cell(7)] == ["n/a", "0.123", "7"]


def test_columns_of_words_stand_left_and_late_rows_are_folded():
    page = table(
        ["name", "file", "AP", "place"], [["1", "a.jpg", "0.1", "n/a"], ["2", "", "n/a", 3], ["3", "", "", ""]], shown=2
    )
    assert page.count('<th class="text">file</th>') == 2 and page.count('<td class="text">') == 3
    first, _, rest = page.partition("<details>")
    assert first.count("<tr>") == 3 and rest.count("<tr>") == 2 and "<summary>1 more</summary>" in rest
    assert "<details>" not in table(["name"], []) and table(["name"], []).count("<th>") == 1
