"""Necks: from the backbone's maps to a pyramid."""
