"""Help texts. They come from the docstring of a command's module and from the declarations of its settings."""

from __future__ import annotations

import ast
import shutil
import textwrap
from collections.abc import Iterable

from fpn_det.cli.declarations import CONFIGS, class_of_field, declarations, describe_setting, experiments
from fpn_det.locations import PACKAGE

# Commands by group, in the order in which they are needed.
GROUPS = {
    "Train and evaluate": ("train", "eval", "predict", "report"),
    "Data": ("check-data", "show-data", "convert-data"),
    "Runs and weights": ("runs", "show-pyramid", "weights", "convert-weights", "export", "replay"),
    "This installation": ("doctor", "experiments", "settings", "benchmark"),
}
COMMANDS = tuple(command for commands in GROUPS.values() for command in commands)

# The class that declares a command's own options.
OPTIONS = {
    "eval": "fpn_det.config.EvalConfig",
    "predict": "fpn_det.cli.predict.PredictConfig",
    "report": "fpn_det.cli.report.ReportConfig",
    "export": "fpn_det.export.export.ExportConfig",
    "check-data": "fpn_det.cli.check_data.CheckDataConfig",
    "show-data": "fpn_det.cli.show_data.ShowDataConfig",
    "convert-data": "fpn_det.annotations.conversion.ConversionConfig",
    "runs": "fpn_det.cli.runs.RunsConfig",
    "show-pyramid": "fpn_det.cli.show_pyramid.ShowPyramidConfig",
    "convert-weights": "fpn_det.cli.convert_weights.ConvertWeightsConfig",
    "replay": "fpn_det.cli.replay.ReplayConfig",
    "benchmark": "fpn_det.benchmark.config.BenchmarkConfig",
}
TRAIN_CONFIG = "fpn_det.training.config.TrainConfig"

# The settings that people want first, in the order of a first run.
FIRST_SETTINGS = (
    "data.root",
    "data.classes",
    "data.val_fraction",
    "data.on_error",
    "data.num_workers",
    "data.train_transforms.resize.sides",
    "model.backbone.depth",
    "model.backbone.weights",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.batch_size",
    "trainer.eval_every",
    "trainer.ema",
    "optimizer.lr",
    "precision",
    "device",
    "seed",
    "run_dir",
    "resume",
    "run",
    "init_from",
)
# Of those, the ones that matter where nothing is trained.
EVAL_SETTINGS = (
    "data.root",
    "data.num_workers",
    "data.eval_batch_size",
    "tile.size",
    "tile.overlap",
    "precision",
    "device",
)
DATA_SETTINGS = ("data.root", "data.classes", "data.val_fraction", "data.on_error")
COMPOSED = {"train": FIRST_SETTINGS, "eval": EVAL_SETTINGS, "predict": EVAL_SETTINGS[1:], "report": EVAL_SETTINGS,
            "show-pyramid": ("data.root", "device"), "export": EVAL_SETTINGS[:2],
            "check-data": DATA_SETTINGS, "show-data": DATA_SETTINGS}  # fmt: skip
# Commands that take all settings from a run.
OF_A_RUN = ("eval", "predict", "report", "show-pyramid", "export")
# Options of these that are not the settings of the same name, and inherited ones that a command does not use.
OWN = {"run", "precision"}
UNUSED = {"predict": {"split", "timeout_minutes"}, "show-pyramid": {"tta", "precision", "timeout_minutes"}}
GROUP_CHOICES = ("data", "backbone", "neck", "optimizer", "schedule")


def overview() -> str:
    """The help of `fpn-det` itself."""
    lines = ["Train object detectors built around the Feature Pyramid Network.", "", "fpn-det <command> name=value ..."]
    for title, commands in GROUPS.items():
        rows = ((command, docstring(command).splitlines()[0]) for command in commands)
        lines += ["", f"{title}:", format_rows(rows, left=19)]
    lines += [
        "",
        "First steps, with data in YOLO's layout (also: COCO JSON, Pascal VOC, CSV):",
        "  fpn-det check-data experiment=small data=yolo data.root=<folder>",
        "  fpn-det train experiment=small data=yolo data.root=<folder>",
        "  fpn-det report run=runs/small/<date>_<time>",
        "",
        "fpn-det <command> --help shows the options of a command.",
    ]
    return "\n".join(lines)


def docstring(command: str) -> str:
    """The docstring of a command's module, read from its source."""
    file = PACKAGE / "cli" / f"{command.replace('-', '_')}.py"
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def command_help(command: str) -> str:
    """The help of one command."""
    parts = [_wrapped(paragraph) for paragraph in docstring(command).split("\n\n")]
    if command in ("train", "check-data", "show-data"):
        parts.append("Experiments (`fpn-det experiments` lists all):\n" + format_rows(_main_experiments()))
        parts.append("Groups of settings:\n" + format_rows((f"{group}=", _options(group)) for group in GROUP_CHOICES))
    if command in OPTIONS:
        parts.append("Options:\n" + format_rows(_own_options(command)))
    if command in COMPOSED:
        of_a_run = command in OF_A_RUN
        title = (
            "Settings of the run that are changed most often"
            if of_a_run
            else "Settings that are changed most often, with their defaults"
        )
        rows = format_rows(_settings(COMPOSED[command], with_defaults=not of_a_run))
        parts.append(f"{title}:\n{rows}")
        parts.append(_wrapped("`fpn-det settings [word]` lists all settings; --cfg job prints them with their values."))
    return "\n\n".join(parts)


def script_help(text: str, options: str) -> str:
    """The help of a script of the checkout: its docstring, and the class of its options."""
    found = declarations(options).items()
    rows = ((f"{name}={item.default}", item.describe()) for name, item in found if name != "overrides")
    return "\n\n".join([*map(_wrapped, text.strip().split("\n\n")), f"Options:\n{format_rows(rows)}"])


def _width() -> int:
    return max(60, min(120, shutil.get_terminal_size().columns)) - 1


def _wrapped(paragraph: str) -> str:
    """Prose at the width of the terminal; examples keep their lines."""
    if "\n  " in paragraph:
        return paragraph
    return textwrap.fill(paragraph, _width(), break_long_words=False, break_on_hyphens=False)


def _main_experiments() -> Iterable[tuple[str, str]]:
    return ((f"experiment={name}", text) for name, text in experiments().items() if "/" not in name)


def _options(group: str) -> str:
    return ", ".join(sorted(file.stem for file in (CONFIGS / group).glob("*.yaml")))


def _own_options(command: str) -> Iterable[tuple[str, str]]:
    hidden = {"overrides"}
    if command in COMPOSED:
        hidden |= set(declarations(TRAIN_CONFIG)) - (OWN - set(COMPOSED[command]))
    for name, item in declarations(OPTIONS[command]).items():
        if name in hidden | UNUSED.get(command, set()):
            continue
        parts = declarations(class_of_field(OPTIONS[command], name)) if item.default == "" else {name: item}
        for part in parts.values():
            default = "<required>" if part.default is None else part.default
            place, meaning = (name, "") if part is item else (f"{name}.{part.name}", f"{item.describe()}: ")
            yield f"{place}={default}", meaning + part.describe()


def _settings(names: Iterable[str], with_defaults: bool) -> Iterable[tuple[str, str]]:
    for name in names:
        if item := describe_setting(name):
            yield f"{name}={item.default if with_defaults else ''}", item.describe()


def format_rows(rows: Iterable[tuple[str, str]], left: int = 34) -> str:
    """Two columns, the second from character `left` on; a long left side gets a line of its own, or two."""
    width = _width()
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - left, break_on_hyphens=False) or [""]
        if len(name) > left - 4:
            first, equals, value = name.partition("=")
            lines += [f"  {name}"] if len(name) + 2 <= width else [f"  {first}{equals}", f"    {value}"]
        else:
            lines.append(f"  {name:{left - 2}}{wrapped.pop(0)}".rstrip())
        lines += [" " * left + line for line in wrapped if line]
    return "\n".join(lines)
