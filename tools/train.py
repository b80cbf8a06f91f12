"""Train a detector: python tools/train.py experiment=<name> [setting=value ...].

The experiments are in configs/experiment. `--cfg job` shows all settings, `run=<folder>` starts with those of an earlier
run, `resume=auto` goes on with an interrupted one. On several GPUs: torchrun --nproc_per_node=8 tools/train.py ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from fpn_det.assembly import build_parts, check_parts
from fpn_det.config import Settings, argument, launch
from fpn_det.errors import explained
from fpn_det.runs.folder import choose_folder, write_settings
from fpn_det.runs.log import RunLog
from fpn_det.runtime import process_group
from fpn_det.training.profile import profiled
from fpn_det.training.run import Run


def train(settings: Settings) -> None:
    """One run, in a folder of its own."""
    trainer = settings.trainer
    with process_group(settings.device, trainer.timeout_minutes) as (ranks, device):
        check_parts(settings, ranks, device)
        folder = choose_folder(settings.experiment, settings.run_dir, settings.resume, settings.set_aside)
        with folder.held(), explained(folder.rescue), RunLog(folder.path, ranks) as log:
            parts = build_parts(settings, ranks, device, log, fresh=not folder.resume)
            if ranks.is_main:
                write_settings(folder.path, parts.meaning["config"], HydraConfig.get().overrides.task)
            run = Run(parts, trainer, settings.precision, settings.seed, ranks, folder, log)
            with profiled(settings.profile, log):
                exit_code = run.train()
    if exit_code:
        sys.exit(exit_code)


def saved_settings() -> str:
    """What the run named on the command line was made with."""
    file = Path(argument("run") or "") / "config.yaml"
    if not file.is_file():
        raise ValueError(f"run: expected the folder of a run, got {file.parent}, which has no {file.name}.")
    return file.read_text()


if __name__ == "__main__":
    if argument("run") is None:
        launch(train, Settings, "train")
    else:
        launch(train, Settings, "rerun", saved_settings)
