"""Bring weights from one project to another.

python tools/convert_weights.py source=auto target=fpn_det input=model_final.pkl output=model.pt [name=value ...]

Projects: torchvision (fasterrcnn_resnet50_fpn and its v2), detectron2, mmdet, fpn_det. Every tensor of the input is
accounted for, or nothing is written. What becomes fpn_det is a checkpoint that tools/eval.py takes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from fpn_det.cli.launch import WRONG_COMMAND_LINE
from fpn_det.composition import compose
from fpn_det.interop.conversion import convert
from fpn_det.interop.loading import read_as_ours
from fpn_det.interop.naming import Project
from fpn_det.interop.writing import write_weights
from fpn_det.pretrained import settings_for, to_checkpoint
from fpn_det.runs.checkpoint import save_checkpoint
from fpn_det.schema import fit


@dataclass(frozen=True)
class Setting:
    """What to convert, and to what."""

    target: Project
    input: str  # file of weights or checkpoint of any kind that the project writes
    output: str  # file
    source: Literal["auto", Project] = "auto"  # auto finds out by the names of the tensors
    class_names: list[str] | None = None  # of the rows, if the file does not say and they are not COCO's
    norm_eps: float | None = None  # what the source's backbone adds to variances; null = known from the file
    experiment: str | None = (
        None  # for target=fpn_det, whose settings go with the weights; null = the source's compat/...
    )


def parse(words: Sequence[str]) -> Setting:
    """The setting that `name=value` words ask for.

    Raises:
        ValueError: a name is unknown or missing, or a value has another type.
    """
    given: Any = OmegaConf.to_container(OmegaConf.from_cli(list(words)))
    defaults = {name: None for name in ("class_names", "norm_eps", "experiment")} | {"source": "auto"}
    return fit(defaults | given, Setting, "", ())


def main(words: Sequence[str]) -> None:
    """Read, convert, write, and print what became of the tensors."""
    setting = parse(words)
    project = None if setting.source == "auto" else setting.source
    weights = read_as_ours(setting.input, setting.class_names, project, setting.norm_eps)
    print(
        f"{setting.input}: weights of {weights.project}, {weights.num_classes} classes, ResNet-{weights.layout.depth}"
    )
    print("\n".join(f"  dropped {key}: {reason}" for key, reason in weights.dropped.items()))
    output = Path(setting.output)
    if setting.target == "fpn_det":
        settings = compose([f"experiment={setting.experiment}"]) if setting.experiment else settings_for(weights)
        output.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(output, to_checkpoint(weights, settings))
        print(f"written: {output}\nnext: python tools/eval.py checkpoint={output} data.root=<coco folder>")
    else:
        conversion = convert(weights.state, "fpn_det", setting.target)
        print(conversion.report())
        write_weights(output, conversion.state, setting.target, weights.class_names)
        print(
            f"written: {output}\nnext: run it with the pixel order, statistics, strides and anchors of {weights.project}: weights do not show them"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(WRONG_COMMAND_LINE)
