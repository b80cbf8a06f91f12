"""Detectors as files that run without Python's training code: ONNX and OpenVINO, with a proof of fidelity."""
