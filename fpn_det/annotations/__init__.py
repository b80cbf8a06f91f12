"""Data sets on disk: their formats, what is wrong with them, and one table of all images and objects."""
