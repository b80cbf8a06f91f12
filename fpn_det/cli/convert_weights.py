"""Convert weights between projects: torchvision, detectron2, mmdet, fpn_det; or to safetensors.

Reads fasterrcnn_resnet50_fpn and its v2 of torchvision, and the Faster R-CNN with FPN of the others. Every tensor of the
input is accounted for, or nothing is written. target=fpn_det writes a checkpoint that `fpn-det eval` takes; safetensors
the weights alone, with class names, category ids, thresholds and settings, which it takes as well.

Examples:
  fpn-det convert-weights target=fpn_det input=model_final.pkl output=model.pt
  fpn-det convert-weights target=torchvision input=best.pt output=best.pth
  fpn-det convert-weights target=safetensors input=best.pt output=b.safetensors
  fpn-det convert-weights target=fpn_det input=a.pth output=a.pt
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fpn_det.cli.arguments import run_command
from fpn_det.composition import compose
from fpn_det.interop.conversion import convert
from fpn_det.interop.loading import read_as_ours
from fpn_det.interop.naming import Project
from fpn_det.interop.writing import write_weights
from fpn_det.pretrained import settings_for, to_checkpoint
from fpn_det.runs.checkpoint import save_checkpoint, save_weights
from fpn_det.terminal import say, standard_console
from fpn_det.weight_files import SAFETENSORS

Target = Literal[Project, "safetensors"]


@dataclass(frozen=True, kw_only=True)
class ConvertWeightsConfig:
    """Options of `fpn-det convert-weights`."""

    target: Target  # fpn_det, torchvision, detectron2, mmdet; or safetensors, weights alone
    input: str  # file of weights or checkpoint, in any form that its project writes
    output: str  # file to write
    source: Literal["auto", Project] = "auto"  # auto = recognized by the names of the tensors
    class_names: list[str] | None = None  # in the order of the outputs; null = those of the file, or COCO's
    norm_eps: float | None = None  # added to variances in the source's backbone; null = known from the file
    experiment: str | None = None  # whose settings a checkpoint of fpn_det gets; null = the source's compat/...


def main() -> None:
    """Convert with the options of the command line."""
    run_command(convert_weights, ConvertWeightsConfig)


def convert_weights(config: ConvertWeightsConfig) -> None:
    """Read, convert, write, and print what became of each tensor."""
    output = Path(config.output)
    if (config.target == "safetensors") != (output.suffix == SAFETENSORS):
        raise ValueError(
            f"output: expected a name that ends in {SAFETENSORS} with target=safetensors and with no other, got {output} "
            f"with target={config.target}."
        )
    project = None if config.source == "auto" else config.source
    weights = read_as_ours(config.input, config.class_names, project, config.norm_eps)
    backbone = "" if config.target == "safetensors" else f", ResNet-{weights.layout.depth}"
    console = standard_console()
    say(console, f"{config.input}: weights of {weights.project}, {weights.num_classes} classes{backbone}")
    for reason in dict.fromkeys(weights.dropped.values()):
        keys = [key for key, why in weights.dropped.items() if why == reason]
        say(console, f"  dropped {', '.join(keys)}: {reason}")
    if config.target == "fpn_det" or config.target == "safetensors":
        settings = compose([f"experiment={config.experiment}"]) if config.experiment else settings_for(weights)
        output.parent.mkdir(parents=True, exist_ok=True)
        save = save_checkpoint if config.target == "fpn_det" else save_weights
        save(output, to_checkpoint(weights, settings))
        word = shlex.quote(f"checkpoint={output}")
        say(console, f"written: {output}\nnext: fpn-det eval {word} data.root=<folder>")
    else:
        conversion = convert(weights.state, "fpn_det", config.target)
        say(console, conversion.report())
        write_weights(output, conversion.state, config.target, weights.class_names)
        say(
            console,
            f"written: {output}\nnext: run it with the pixel order, statistics, strides and anchors of {weights.project}, "
            "which weights do not contain",
        )
