"""The entry of all commands that take settings: compose them, run the command, end with one sentence on failure."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fpn_det.composition import (
    COMPOSING,
    CONFIGS,
    C,
    Saved,
    compose_as,
    compose_files,
    describe_refusal,
    is_selection,
    parse_words,
    read_saved,
    with_literal_path,
)
from fpn_det.errors import SystemFault, is_user_facing, translate_system_errors
from fpn_det.runs.overview import compare_runs, find_runs, runs_table, write_results
from fpn_det.runs.settings_diff import setting_of
from fpn_det.runtime import is_reported_by_main
from fpn_det.terminal import SafeConsole, say, shown_path, standard_console
from fpn_det.training.config import TrainConfig

USER_ERRORS = (ValueError, FloatingPointError, SystemFault)  # wrong input, diverged training, failures of the system
FAILED, WRONG_COMMAND_LINE = 1, 2  # exit codes

# A command: gets its config and the words of the command line.
Command = Callable[[Any, Sequence[str]], object]


def argument(name: str) -> str | None:
    """The value of `name=value` on the command line, for what is needed before settings are composed."""
    words = [with_literal_path(word) for word in sys.argv[1:] if word.startswith(f"{name}=")]
    return None if not words else str(parse_words(words)[-1].value())


def launch(command: Command, schema: type[C], config_name: str, saved: Callable[[], str] | None = None) -> None:
    """Compose the settings that the command line asks for and run `command` with them.

    Wrong input (a ValueError of ours) ends in one sentence and exit code 2; diverged training and failures of the system
    end in one sentence and exit code 1; anything else with its traceback.

    Args:
        command: the work.
        schema: its config class.
        config_name: file in configs/.
        saved: returns the text of an earlier run's settings, which the file's defaults list calls `saved`.
    """
    options = [word for word in sys.argv[1:] if word.startswith("-")]
    is_swept = options in (["-m"], ["--multirun"])
    words = [with_literal_path(word, is_swept) for word in sys.argv[1:] if not word.startswith("-")]
    try:
        earlier = read_saved(saved()) if saved else None
        if earlier and earlier.added and os.environ.get("RANK", "0") == "0":
            print(f"Not in the saved settings, so with their defaults: {', '.join(earlier.added)}.", file=sys.stderr)
        if is_swept:
            _sweep(command, schema, config_name, words, earlier)
        elif options in (["-c"], ["--cfg"]) and "job" in words:
            print(compose_as(schema, config_name, [word for word in words if word != "job"], earlier).to_yaml(), end="")
        elif options:
            raise ValueError(f"command line: expected name=value, got '{options[0]}'. --help shows the settings.")
        else:
            with translate_system_errors():
                command(compose_as(schema, config_name, words, earlier), words)
    except COMPOSING as error:
        end_with(ValueError(describe_refusal(error)))
    except USER_ERRORS as error:
        end_with(error)


def end_with(error: Exception) -> NoReturn:
    """End the process with one sentence; an unexpected error keeps its traceback."""
    rank = os.environ.get("RANK", "0")
    if not is_user_facing(error):
        raise error
    if not is_reported_by_main(error):
        text = str(error) if rank == "0" else f"rank {rank}: {error}"
        say(SafeConsole(stderr=True, highlight=False), text)
    sys.exit(WRONG_COMMAND_LINE if isinstance(error, ValueError) else FAILED)


def _sweep(command: Command, schema: type[C], config_name: str, words: Sequence[str], saved: Saved | None) -> None:
    """Let Hydra's sweeper and launcher start the jobs. Each job composes its settings as a single run does."""
    _check_selections(config_name, words, saved)

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    def main(tree: DictConfig) -> None:
        join_cluster()
        job = HydraConfig.get()
        job_words = [word.removeprefix("++") for word in job.overrides.task]
        config = compose_as(schema, config_name, job_words, saved)
        names_folder = any(word.startswith("run_dir=") for word in job_words)  # one of an experiment is for single runs
        if isinstance(config, TrainConfig) and not names_folder and config.resume in (None, "auto"):
            config = replace(config, run_dir=job.runtime.output_dir, set_aside=False)
        with translate_system_errors():
            command(config, job_words)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's short message would advise to write +name=value
    # Hydra refuses names that YAML files do not list; which names exist is decided when a job composes its settings.
    sys.argv[1:] = ["-m", *(word if _is_hydras(word) or word[0] in "+~" else f"++{word}" for word in words)]
    with translate_system_errors():
        main()


def _is_hydras(word: str) -> bool:
    return is_selection(setting_of(word), [CONFIGS])


def _check_selections(config_name: str, words: Sequence[str], saved: Saved | None) -> None:
    """Compose every combination of files that a sweep selects, which refuses settings of Hydra that come from a file.

    Hydra itself would act on them before a job composes its settings.
    """
    choices = []
    for word, override in zip(words, parse_words(words), strict=True):
        if _is_hydras(word):
            swept = override.is_sweep_override()
            choices.append(
                [f"{override.key_or_group}={one}" for one in override.sweep_string_iterator()] if swept else [word]
            )
    for selection in product(*choices):
        compose_files(config_name, selection, saved)


def join_cluster() -> None:
    """In a job of Hydra's submitit launcher: set the variables that torchrun would have set."""
    if "SUBMITIT_EXECUTOR" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment  # an optional extra

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


class SweepResults(Callback):
    """Prints one table of all runs when a sweep has ended, and writes it to the sweep's folder."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        if runs := find_runs(folder):
            names, rows = compare_runs(runs, folder)
            write_results(folder, names, rows)
            console = standard_console()
            for line in runs_table(runs, folder, console.width):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            say(console, f"{shown_path(folder / 'results.md')} and results.csv")
