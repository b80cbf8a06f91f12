"""`python -m fpn_det.doctor`: what is installed, what it runs on, and whether the two fit together."""

from __future__ import annotations

import importlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "torchvision", "pycocotools", "hydra-core", "tensorboard", "albumentations", "numpy")


def versions() -> dict[str, str]:
    """Version of each package that fpn_det needs, and of what torch was built for."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    found["CUDA of torch"] = torch.version.cuda or "none"
    return found


def devices() -> list[torch.device]:
    """Every device that torch sees."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def try_operators(device: torch.device) -> str | None:
    """Run torchvision's compiled operators on a device; what went wrong, or None."""
    try:
        ops = importlib.import_module("torchvision.ops")
        boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 7.0]], device=device)
        kept = ops.nms(boxes, torch.tensor([0.5, 0.9], device=device), 0.5)
        pooled = ops.roi_align(torch.ones(1, 1, 8, 8, device=device), [boxes], 2)
    except Exception as error:  # whatever it is, it is what the user has to be told
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if kept.tolist() != [1] or not torch.allclose(pooled, torch.ones_like(pooled)):
        return "the operators ran but their results are wrong"
    return None


def remedy(device: torch.device, found: dict[str, str]) -> str:
    """One sentence: what to do when the operators fail on a device."""
    pair = f"torch {found['torch']} and torchvision {found['torchvision']}"
    if device.type == "cpu":
        return f"{pair} do not fit together: install them as a pair, pip install --force-reinstall torch torchvision."
    return (
        f"{pair} do not run on {device} (torch is built for CUDA {found['CUDA of torch']}): "
        f"install the pair that fits your driver, or train with device=cpu."
    )


def main() -> int:
    """Print the findings; the exit code is 0 if everything runs."""
    found = versions()
    for name, text in found.items():
        print(f"{name:14} {text}")
    missing = [package for package in PACKAGES if found[package] == "missing"]
    if missing:
        print(f"Missing: {', '.join(missing)}. Install them: pip install {' '.join(missing)}.")
        return 1
    healthy = True
    for device in devices():
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        )
        trouble = try_operators(device)
        print(f"{device!s:14} {name}: {'nms and roi_align run' if trouble is None else trouble}")
        if trouble is not None:
            healthy = False
            print(remedy(device, found))
    if healthy:
        print("All is well.")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
