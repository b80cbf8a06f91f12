"""Readers: from the files of each format to `RawDataset`."""
