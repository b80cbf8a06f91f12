"""The detector and its parts: backbone, neck, RPN, ROI head. Each builds in a REPL from plain values."""
