"""Run folders: checkpoints, logs, metrics and settings."""
