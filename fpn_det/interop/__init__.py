"""Weights of other projects: safe reading of their files, conversion both ways, loading with a report."""
