"""What the tests share. Each worker computes on one core, so that two of them fill two cores and no more."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported, which comes after this file
