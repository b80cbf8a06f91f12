"""Text of strangers on the screen and in the log."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tiny import TINY

from fpn_det.runs.log import RunLog
from fpn_det.runtime import Ranks
from fpn_det.terminal import PLAIN_WIDTH, SafeConsole, Shortened, printable, say, shorten, standard_console

ATTACK = "\x1b]0;title\x07\x1b[2J\x9b31m\r\u202etxt\ud800"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Größe 猫 é\n\t", "plain, Größe 猫 é\n\t"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b31m\r", r"\x9b31m\r"),
        ("a\ud800b", r"a\ud800b"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ufeffcat\u200b", r"\ufeffcat\u200b"),
        ("\x00\x7f", r"\x00\x7f"),
    ],
)
def test_printable_escapes_what_a_terminal_would_obey(text, shown):
    assert printable(text) == shown
    printable(text).encode("utf-8")


def test_a_pipe_is_no_terminal_where_colors_are_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not SafeConsole(file=io.StringIO()).is_terminal


def test_a_notebook_leaves_the_log_its_lines(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    file = io.StringIO()
    monkeypatch.setattr(file, "isatty", lambda: True, raising=False)  # as in ipykernel
    SafeConsole(file=file, width=80).print("loss 1.25")
    assert file.getvalue() == "loss 1.25\n"
    monkeypatch.setattr("sys.stdout", file)
    assert standard_console().width == PLAIN_WIDTH


def test_console_prints_tables_and_colors_without_foreign_escapes():
    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=True, color_system="standard", width=200)
    table = Table("class")
    table.add_row(Text(ATTACK, style="red"))
    console.print(table)
    text = file.getvalue()
    assert "\x1b[31m" in text  # the console's own
    assert "\x1b]0" not in text and "\x1b[2J" not in text and "\x9b" not in text and r"\x1b]0" in text


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("a/b.jpg", 7, "a/b.jpg"),
        ("/data/set/images/train/0001.jpg", 19, "/dat...ain/0001.jpg"),
        ("/data/set/images/train/image_0001.jpg", 19, "/.../image_0001.jpg"),
        ("/data/set/images/train/my_image_0001.jpg", 19, "/dat...age_0001.jpg"),  # the name does not fit
        ("/data/set/images/train/0001.jpg", 4, "/dat"),
        ("資料/資料/資料/資料/a.jpg", 15, "資 ... 料/a.jpg"),  # two cells a character
    ],
)
def test_long_paths_lose_their_middle(text, width, shown):
    found = shorten(text, width)
    assert cell_len(found) <= width
    assert found == shown


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_long_path_takes_no_other_column_of_a_table(tmp_path, width):
    file = io.StringIO()
    table = Table("split", "images", "in")
    table.add_row("train", "118287", Shortened(tmp_path.joinpath(*["folder"] * 30) / "0001.jpg"))
    SafeConsole(file=file, width=width).print(table)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    (row,) = (line for line in lines if "train" in line)
    assert "118287" in row and "..." in row and "0001.jpg" in row


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_lines_that_are_broken_between_words_only(is_terminal):
    file = io.StringIO()
    console = SafeConsole(file=file, width=40, force_terminal=is_terminal, color_system=None)
    command = "  fpn-det train resume=runs/experiment/2026-01-01_10-00-00"
    text = f"best F1 0.66123 with one score threshold 0.18345 for all [red]classes[/red]\n{command}"
    say(console, text)
    printed = file.getvalue()
    assert printed.split() == text.split() and f"{command}\n" in printed
    assert printed.startswith("best F1 0.66123 with one score threshold\n  0.18345 for all ") == is_terminal


def test_log_and_screen_of_a_run_hold_no_escapes_and_end_with_no_encoding(tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    with pytest.raises(KeyError), RunLog(tmp_path, Ranks(), Console(file=stream, width=100)) as log:
        log.info(f"class 猫 {ATTACK}")
        raise KeyError(ATTACK)
    written = (tmp_path / "log.txt").read_bytes().decode("utf-8")
    assert "猫" in written and "\x1b" not in written and "\x9b" not in written


def test_class_names_with_escapes_reach_no_output_of_a_run(run_tool, shapes_dataset, tmp_path):
    data = shutil.copytree(shapes_dataset, tmp_path / "data")
    for split in ("train", "val"):
        path = data / "annotations" / f"instances_{split}2017.json"
        document = json.loads(path.read_text())
        document["categories"][0]["name"] = "\x1b[2Jcat\u202e|[/red]"
        path.write_text(json.dumps(document))
    settings = [*TINY, f"data.root={data}", "data.classes=null"]
    checked = run_tool("check_data.py", *settings)
    assert "Traceback" not in checked.stderr and "\x1b" not in checked.stdout + checked.stderr
    trained = run_tool("train.py", *settings, "run_dir=run", "trainer.max_steps=1")
    assert "Traceback" not in trained.stderr
    assert "\x1b" not in trained.stdout + trained.stderr
    if trained.returncode == 0:
        assert "\x1b" not in (tmp_path / "run" / "log.txt").read_text()
