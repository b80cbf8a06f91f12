"""The report of a trained detector: what it reaches, where it fails, and whether it is better than another."""
