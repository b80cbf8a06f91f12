"""Figures for TensorBoard and HTML pages."""
