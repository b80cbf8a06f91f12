"""Detectors as files that run without Python's training code: ONNX, OpenVINO and torch.export, with a proof of fidelity."""
