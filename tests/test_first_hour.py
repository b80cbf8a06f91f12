"""docs/first_hour.ipynb: committed as it ran, and executed from a copy of what it needs of the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from tiny import ROOT

NOTEBOOK = ROOT / "docs" / "first_hour.ipynb"
MAX_BYTES = 300_000
# The command of this checkout, whichever one is installed.
COMMAND = "#!{python}\nfrom fpn_det.cli.main import main\nmain()\n"


def code_cells(notebook: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def errors(notebook: Mapping[str, Any]) -> list[str]:
    """Errors of Python, and of commands, which do not end a notebook."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    texts = ["".join(output.get("text", "")) for output in outputs]
    found = [text for text in texts if re.search(r"Traceback|: expected .*, got |command not found", text)]
    return found + [output["evalue"] for output in outputs if output["output_type"] == "error"]


def test_the_notebook_is_committed_as_it_ran():
    text = NOTEBOOK.read_text()
    notebook = json.loads(text)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not errors(notebook)
    pictures = [output for cell in cells for output in cell["outputs"] if "image/jpeg" in output.get("data", {})]
    assert len(pictures) >= 2 and len(text) < MAX_BYTES
    assert not re.search(r"/home/|/root/|/tmp/|\\u001b", text)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    for name in ("ipykernel", "timm"):
        pytest.importorskip(name)
    for name in ("docs/first_hour.ipynb", "datasets/make_shapes.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "fpn-det").write_text(COMMAND.format(python=sys.executable))
    (programs / "fpn-det").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(tmp_path / "docs" / "first_hour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path / "docs")}}).execute()
    nbformat.validate(notebook)
    assert not errors(notebook)
    printed = ["".join(output.get("text", "")) for cell in code_cells(notebook) for output in cell["outputs"]]
    assert not [text for text in printed if "\x1b" in text]  # no states of progress bars
    run = tmp_path / "runs" / "first_hour"
    assert json.loads((run / "metrics.json").read_text())["AP50"] > 0.5
    assert "evaluation at step 150" in (run / "log.txt").read_text()
