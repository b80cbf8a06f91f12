"""Figures for TensorBoard and reports."""
