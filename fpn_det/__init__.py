"""fpn_det: train object detectors built around the Feature Pyramid Network."""

__version__ = "0.1.0"
