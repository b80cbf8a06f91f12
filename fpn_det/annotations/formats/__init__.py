"""Readers of the annotation formats; each returns a `RawDataset`."""
