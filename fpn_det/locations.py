"""Folders of the package, and names of files in folders of the user."""

import os
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
CONFIGS = (
    PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
)  # of a wheel or a checkout


def below_common_folder(files: Sequence[Path]) -> list[Path]:
    """Return the path of each file below the folder that all of them are in: its name, if that is the folder of all."""
    places = [os.path.abspath(file) for file in files]  # without `..`, which would lead out of the folder
    parents = {os.path.dirname(place) for place in places}
    common = os.path.commonpath(parents) if parents else ""
    return [Path(place[len(common) :].lstrip(os.sep)) for place in places]
