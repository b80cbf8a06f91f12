"""Folders of the package."""

from pathlib import Path

PACKAGE = Path(__file__).parent
CONFIGS = (
    PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
)  # of a wheel or a checkout
