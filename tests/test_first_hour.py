"""docs/first_hour.ipynb: runs from a copy of the checkout, and is committed as it ran."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys

import pytest
from tiny import ROOT

NOTEBOOK = ROOT / "docs" / "first_hour.ipynb"
MAX_BYTES = 300_000
# The command of this checkout, whichever one is installed.
COMMAND = "#!{python}\nfrom fpn_det.cli.main import main\nmain()\n"


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def errors(cell) -> list[str]:
    """Errors of Python, and of commands, which do not end a notebook."""
    texts = ["".join(output.get("text", "")) for output in cell.outputs]
    found = [text for text in texts if re.search(r"Traceback|: expected .*, got |command not found", text)]
    return found + [output.evalue for output in cell.outputs if output.output_type == "error"]


def test_the_notebook_is_committed_as_it_ran():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [found for cell in cells for found in errors(cell)]
    pictures = [output for cell in cells for output in cell.outputs if "image/jpeg" in output.get("data", {})]
    assert len(pictures) >= 2 and NOTEBOOK.stat().st_size < MAX_BYTES
    assert not re.search(r"/home/|/root/|/tmp/", NOTEBOOK.read_text())


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
    assert not [found for cell in code_cells(notebook) for found in errors(cell)]
    metrics = json.loads((tmp_path / "runs" / "first_hour" / "metrics.json").read_text())
    assert metrics["AP50"] > 0.5
