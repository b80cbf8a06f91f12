"""`fpn-det doctor`: versions, devices, and a short run of everything that depends on another package.

No third-party package is imported at the top: one that is missing or broken is what the doctor reports.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "torchvision", "pycocotools", "hydra-core", "tensorboard", "albumentations", "numpy", "rich")
OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")
MODULES = ("torch", "torchvision", "pycocotools.mask", "hydra", "tensorboard", "albumentations", "cv2", "numpy", "rich")
SIDE = 64  # px of the images of the trial

# Settings of the trial: a detector that trains a step in a fraction of a second.
SETTINGS = (
    "experiment=small",
    "device=cpu",
    "data.num_workers=0",
    "data.check=false",
    "data.train_transforms.resize=null",
    "data.eval_transforms.resize={_target_: fpn_det.data.transforms.ResizeShortestSide, sides: [96], max_side: 96}",
    "model.neck.channels=16",
    "model.roi_head.box_head.width=32",
    "trainer.batch_size=2",
)


def versions() -> dict[str, str]:
    """Version of Python and of each package that fpn_det needs, and the CUDA version of torch."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = _version(package) or "missing"
    opencv = next((package for package in OPENCV if _version(package)), None)
    found["opencv"] = f"{_version(opencv)} ({opencv})" if opencv else "missing"
    try:
        import torch

        found["CUDA of torch"] = torch.version.cuda or "none"
    except Exception:  # reported by `broken_imports`
        found["CUDA of torch"] = "unknown"
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def outdated() -> list[str]:
    """Packages that are older than the bounds in the metadata of fpn_det, such as `torch>=2.10`."""
    try:
        bounds = requires("fpn_det") or []
    except PackageNotFoundError:  # a checkout that is not installed
        return []
    found = []
    for bound in bounds:
        parsed = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)$", bound)
        if parsed and (installed := _version(parsed[1])) and _numbers(installed) < _numbers(parsed[2]):
            found.append(bound)
    return found


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def broken_imports() -> dict[str, str]:
    """The error of each module that cannot be imported."""
    errors = {}
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # of any kind: shared libraries and versions fail in many ways
            errors[name] = _one_line(error)
    return errors


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def devices() -> list[torch.device]:
    """All devices of torch."""
    import torch

    found = [torch.device("cpu")]
    found += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def try_operators(device: torch.device) -> str | None:
    """Run torchvision's compiled operators on a device; returns the error, None if there is none."""
    import torch

    try:
        ops = importlib.import_module("torchvision.ops")
        boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 7.0]], device=device)
        kept = ops.nms(boxes, torch.tensor([0.5, 0.9], device=device), 0.5)
        pooled = ops.roi_align(torch.ones(1, 1, 8, 8, device=device), [boxes], 2)
    except Exception as error:  # of any kind: it is reported with the remedy
        return _one_line(error)
    if kept.tolist() != [1] or not torch.allclose(pooled, torch.ones_like(pooled)):
        return "the operators ran but their results are wrong"
    return None


def remedy(device: torch.device, found: dict[str, str]) -> str:
    """Advice for operators that fail on a device."""
    pair = f"torch {found['torch']} and torchvision {found['torchvision']}"
    if device.type == "cpu":
        return f"{pair} do not fit together: install them as a pair, pip install --force-reinstall torch torchvision."
    return (
        f"{pair} do not run on {device} (torch is built for CUDA {found['CUDA of torch']}): "
        f"install the pair that fits your driver, or train with device=cpu."
    )


class Trial:
    """A tiny training run, step by step; each method needs those before it.

    Args:
        folder: empty, for the data set and what is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = {}

    def read_images(self) -> None:
        """Write and read images in the formats that fpn_det reads most."""
        import numpy as np
        from PIL import Image

        from fpn_det.image_io import read_image

        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        pixels[16:48, 16:48] = (200, 40, 20)
        for number, ending in enumerate(("png", "jpg", "png", "jpg")):
            path = self.folder / f"{number}.{ending}"
            Image.fromarray(pixels).save(path, quality=95)
            found = read_image(path)
            if found.shape != pixels.shape or np.abs(found.astype(int) - pixels).mean() > 4:
                raise ValueError(f"read_image: expected the pixels that were written to {path.name}, got others")

    def compose(self) -> None:
        """Compose the settings."""
        from fpn_det.composition import compose

        self._write_annotations()
        annotations = self.folder / "annotations.json"
        places = [f"data.{split}.{name}={value!r}" for split in ("train", "val")
                  for name, value in (("images", str(self.folder)), ("annotations", str(annotations)))]  # fmt: skip
        self.values["config"] = compose([*SETTINGS, *places, "data.on_error=fix"])

    def _write_annotations(self) -> None:
        import json

        names = sorted(path.name for path in self.folder.iterdir())
        images = [{"id": k, "file_name": name, "width": SIDE, "height": SIDE} for k, name in enumerate(names, 1)]
        boxes = [{"id": k, "image_id": k, "category_id": 1, "bbox": [16, 16, 32, 32], "area": 1024, "iscrowd": 0}
                 for k in range(1, len(names) + 1)]  # fmt: skip
        document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "square"}]}
        (self.folder / "annotations.json").write_text(json.dumps(document), encoding="utf-8")

    def transform(self) -> None:
        """Read the annotations, transform and resize the images, collate a batch."""
        import torch

        from fpn_det.runtime import Ranks

        config, device = self.values["config"], torch.device("cpu")
        annotations = config.data.check_split("train", None).annotations
        model = config.build_model(annotations.num_classes)
        batches = config.train_loader(annotations, model.stride, Ranks(), device).rebuild(0)
        loader = config.eval_loader(annotations, model.stride, Ranks(), device)
        self.values |= {"annotations": annotations, "model": model, "batches": batches, "loader": loader}

    def draw(self) -> None:
        """Draw a batch with its boxes."""
        from fpn_det.visualization.panels import draw_batch

        for batch in self.values["batches"]:
            draw_batch(batch, self.values["annotations"].class_names)

    def train(self) -> None:
        """Train one step."""
        import torch

        config, model = self.values["config"], self.values["model"]
        optimizer = config.build_recipe().build(model, 2)
        for batch in self.values["batches"]:
            loss = model(batch, 0).total()
            loss.backward()
        if not torch.isfinite(loss):
            raise ValueError(f"training step: expected a finite loss, got {loss.item()}")
        optimizer.step()

    def evaluate(self) -> None:
        """Detect and evaluate."""
        from fpn_det.evaluation.evaluate import evaluate

        values = self.values
        evaluate(values["model"], values["loader"], values["annotations"], values["config"].evaluation)

    def log(self) -> None:
        """Write a curve for TensorBoard and a line of the log."""
        from rich.console import Console

        from fpn_det.runs.log import RunLog
        from fpn_det.runs.meters import Pace
        from fpn_det.runtime import Ranks

        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            with RunLog(self.folder / "run", Ranks(), Console(file=nowhere)) as log:
                log.begin(Pace(0, 1, 1, 0))
                log.scalars(1, {"trial": 1.0})


# Each part of the trial, and the packages that it depends on.
PARTS: tuple[tuple[str, Callable[[Trial], None], str], ...] = (
    ("read images", Trial.read_images, "opencv-python-headless pillow numpy"),
    ("compose settings", Trial.compose, "hydra-core omegaconf"),
    ("transform and resize", Trial.transform, "albumentations opencv-python-headless numpy"),
    ("draw", Trial.draw, "pillow numpy"),
    ("train one step", Trial.train, "torch torchvision"),
    ("evaluate", Trial.evaluate, "pycocotools numpy torch torchvision"),
    ("log", Trial.log, "tensorboard rich"),
)


def try_everything() -> list[str]:
    """Run the trial and print each part with its time. Returns the remedies, none if everything works."""
    with tempfile.TemporaryDirectory(prefix="fpn_det_doctor_") as folder:
        trial = Trial(Path(folder))
        for name, part, packages in PARTS:
            start = time.perf_counter()
            try:
                part(trial)
            except Exception as error:  # of any kind: it is reported with the remedy
                print(f"{name:22} fails: {_one_line(error)}")
                return [f"'{name}' fails with the installed versions. Update them: pip install --upgrade {packages}."]
            print(f"{name:22} works ({time.perf_counter() - start:.2f} s)")
    return []


def main() -> int:
    """Print the findings; returns 0 if everything works, otherwise 1."""
    found = versions()
    for name, text in found.items():
        print(f"{name:22} {text}")
    missing = [package for package in PACKAGES if found[package] == "missing"]
    if found.get("opencv") == "missing":
        missing.append(OPENCV[0])
    if missing:
        print(f"Missing: {', '.join(missing)}. Install them: pip install {' '.join(missing)}.")
        return 1
    problems = [f"{bound}: an older version is installed. Update it: pip install '{bound}'." for bound in outdated()]
    if broken := broken_imports():
        for name, error in broken.items():
            print(f"{name:22} cannot be imported: {error}")
        names = ", ".join(broken)
        print(f"{names}: broken installation. Reinstall: pip install --force-reinstall the packages above.")
        return 1
    for device in devices():
        failure = try_operators(device)
        print(f"{device!s:22} {_device_name(device)}: {'nms and roi_align work' if failure is None else failure}")
        if failure is not None:
            problems.append(remedy(device, found))
    try:
        problems += try_everything()
    except OSError as error:
        folder = tempfile.gettempdir() if tempfile.tempdir else "TMPDIR"
        problems.append(f"{folder}: expected a temporary folder that can be written, got: {error}. Set TMPDIR.")
    for problem in problems:
        print(problem)
    if not problems:
        print("Everything works.")
    return 1 if problems else 0


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
