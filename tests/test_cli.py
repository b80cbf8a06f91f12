"""The console script, its help, and the one dialect of all commands."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml
from tiny import ROOT

from fpn_det.cli import help as help_texts
from fpn_det.cli.arguments import fit_words, run_command
from fpn_det.cli.declarations import as_word, declarations, describe_setting, experiments
from fpn_det.cli.settings import describe_tree
from fpn_det.composition import CONFIGS, compose
from fpn_det.interop.catalog import PUBLISHED

HEAVY = ("torch", "hydra", "omegaconf", "numpy")


def start(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-X", "importtime", "-m", "fpn_det.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("words", [[], ["--help"], *([command, "--help"] for command in help_texts.COMMANDS)], ids=str)
def test_help_imports_nothing_heavy(words):
    result = start(*words)
    assert result.returncode == 0
    imported = set(re.findall(r"\| +([\w.]+)$", result.stderr, flags=re.MULTILINE))
    assert "yaml" in imported or "fpn_det.cli.main" in imported, "the list of imports could not be read"
    assert not imported.intersection(HEAVY)
    if words[1:]:
        assert result.stdout.count("\n  fpn-det ") >= (1 if words[0] == "doctor" else 2)


def test_help_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for text in (help_texts.overview(), *map(help_texts.command_help, help_texts.COMMANDS)):
        assert not [line for line in text.splitlines() if len(line) > 80]


def test_tools_show_the_same_help():
    one = subprocess.run([sys.executable, "tools/train.py", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert one.returncode == 0 and one.stdout == start("train", "--help").stdout


def test_scripts_of_the_checkout_show_their_options(monkeypatch, capsys):
    @dataclass
    class Setting:
        """The name of the class of options in tools/storm.py."""

    monkeypatch.setattr(sys, "argv", ["tools/storm.py", "--help"])
    run_command(lambda options: pytest.fail("help only"), Setting)
    shown = capsys.readouterr().out
    assert __doc__ in shown and re.search(r"^  kills=30 +interruptions", shown, re.MULTILINE)


def test_help_of_train_shows_experiments_groups_and_twenty_settings_with_meanings():
    text = help_texts.command_help("train")
    assert "experiment=small" in text and re.search(r"data= +coco, csv, voc, yolo", text)
    assert len(help_texts.FIRST_SETTINGS) >= 20
    for name in help_texts.FIRST_SETTINGS:
        item = describe_setting(name)
        assert item is not None and item.default is not None, name
        assert f"{name}={item.default}" in text


@pytest.mark.parametrize("command", help_texts.OF_A_RUN)
def test_help_of_a_command_for_a_run_shows_its_own_defaults_only(command):
    options, settings = help_texts.command_help(command).split("\nSettings of the run that are changed most often:\n")
    assert "\n  run=null " in options and "data.root=datasets/coco" not in settings
    assert ("\n  tta.scales=[1.0] " in options) == (command in ("eval", "predict", "report"))
    assert ("\n  split=val " in options) == (command in ("eval", "report", "show-pyramid"))
    assert ("\n  precision=fp32 " in options) == (command == "export")


def test_defaults_in_the_help_are_those_of_a_run():
    config = compose()
    for name in help_texts.FIRST_SETTINGS:
        value = config
        for part in name.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        item = describe_setting(name)
        assert item is not None and as_word(value) == item.default, name


def test_every_experiment_is_listed_with_a_sentence():
    found = experiments()
    assert len(found) == len(list((CONFIGS / "experiment").rglob("*.yaml")))
    assert all(text for text in found.values())


def test_a_pipe_that_is_closed_ends_a_command_quietly(tmp_path):
    for number in range(200):  # more than a pipe holds
        (tmp_path / f"{number:03}_{'x' * 200}").mkdir()
        (tmp_path / f"{number:03}_{'x' * 200}" / "config.yaml").write_text("a: 1\n")
    words = [sys.executable, "-m", "fpn_det.cli.main", "runs", "--json"]
    with subprocess.Popen([*words, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


def test_an_unknown_command_is_refused_with_the_nearest():
    result = start("trian")
    assert result.returncode == 2
    assert "fpn-det: expected a command, got 'trian'. Did you mean train?" in result.stderr


def test_commands_refuse_flags_and_unknown_options_in_one_sentence(run_tool):
    for tool, word in [
        ("runs.py", "--all"),
        ("replay.py", "rnk=1"),
        ("convert_weights.py", "targte=mmdet"),
        ("train.py", "run=run(1"),
        ("train.py", "resume=run(1"),
    ]:
        refused = run_tool(tool, word)
        assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1, refused.stderr


@dataclass(frozen=True)
class Options:
    """Options of every kind."""

    path: str
    other: str | None = "set"
    count: int = 1
    kind: Literal["one", "two"] = "one"
    names: list[str] | None = None
    overrides: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["path=a=b, #c [1]{x}.png"], {"path": "a=b, #c [1]{x}.png"}),
        (['path="a=b.png"'], {"path": "a=b.png"}),
        (["path='[x].png'"], {"path": "[x].png"}),
        (["path=[x].png"], {"path": "[x].png"}),
        (["path=2024"], {"path": "2024"}),
        (["bare file.png"], {"path": "bare file.png"}),
        (["path=x", "other=null"], {"other": None}),
        (["path=x", "count=3", "kind=two"], {"count": 3, "kind": "two"}),
        (["path=x", "names=[a,b c]"], {"names": ["a", "b c"]}),
        (["path=x", "names=a,b"], {"names": ["a", "b"]}),
        (["path=x", "names=a"], {"names": ["a"]}),
        (["path=x", "model.neck.channels=3"], {"overrides": ("model.neck.channels=3",)}),
    ],
)
def test_words_become_options(words, expected):
    options = fit_words(words, Options, positional="path")
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "config: expected a value for path, got none. Set path=..."),
        (["path=x", "conut=3"], "conut: there is no setting of that name. Did you mean count?"),
        (["path=x", "count=three"], "count: expected a whole number, got 'three'."),
        (["path=x", "kind=thwo"], "kind: expected one of one or two, got 'thwo'. Did you mean two?"),
        (["path=x", "--count"], "command line: expected name=value, got '--count'. --help shows the options."),
        (["path=x", "overrides=[a]"], "overrides: there is no setting of that name."),
    ],
)
def test_wrong_words_are_refused(words, message):
    with pytest.raises(ValueError) as refusal:
        fit_words(words, Options)
    assert message in str(refusal.value)


def test_declarations_are_read_from_the_source():
    found = declarations("fpn_det.training.config.TrainConfig")
    assert found["seed"].default == "0" and found["seed"].meaning
    assert {"model", "data", "trainer", "run_dir"} <= set(found)
    depth = declarations("fpn_det.models.resnet.ResNet")["depth"]
    assert depth.type == "int" and "18" in depth.meaning


def test_settings_are_listed_with_values_types_and_meanings(run_tool, monkeypatch, capsys):
    from fpn_det.cli.settings import main

    monkeypatch.setattr(sys, "argv", ["fpn-det settings", "batch_size", "experiment=small"])
    main()
    text = capsys.readouterr().out
    assert re.search(r"trainer\.batch_size=4 .*images per step", text)
    assert "optimizer.base_batch_size=4" in text and "model.backbone.depth" not in text


def test_settings_state_what_they_admit_without_a_look_into_the_source():
    rows = dict(describe_tree(yaml.safe_load(compose(["roi_head=conv5"]).to_yaml())))
    assert rows["data.on_error=fail"].endswith("(fail, fix or skip)")
    assert rows["trainer.batch_size=16"].endswith("(a whole number at least 1 or auto)")
    assert rows["optimizer.bias_weight_decay=null"].endswith("null: as for weights (a number at least 0 or null)")
    assert rows["model.roi_head.pooler.canonical_size=224.0"].startswith("a box of this side, px,")  # of LevelAssigner
    assert [row for row in rows.items() if re.search(r"\bNone\b|^see `", row[1])] == []


def test_rows_keep_to_the_width_and_words_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name, value = "data.train_transforms.resize._target_", "fpn_det.data.transforms.ResizeShortestSide"
    meaning = "the rest of a sentence with faster-rcnn_r50_fpn in it"
    assert help_texts.format_rows([(f"{name}={value}", meaning)]).splitlines() == [
        f"  {name}=",
        f"    {value}",
        f"{' ' * 34}the rest of a sentence with",
        f"{' ' * 34}faster-rcnn_r50_fpn in it",
    ]


def test_weights_are_listed_in_lines_of_eighty_characters(capsys, monkeypatch):
    from fpn_det.cli.weights import main

    monkeypatch.setattr(sys, "argv", ["fpn-det weights"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  https://") for line in lines) == len(PUBLISHED)  # whole, to be copied
    assert all(len(line) <= 80 for line in lines if "/" not in line.strip()[:1] and "https://" not in line)


@pytest.mark.parametrize(
    "words",
    [[], ["experiment=demo"], ["neck=bifpn"], ["neck=pafpn"], ["roi_head=conv5"], ["experiment=rpn_r50_fpn"]],
    ids=str,
)
def test_every_setting_has_a_meaning(words):
    rows = dict(describe_tree(yaml.safe_load(compose(words).to_yaml())))
    assert len(rows) > 100
    assert [name for name, meaning in rows.items() if not meaning or meaning.startswith("(")] == []
