"""COCO metrics, their engines, and the evaluation of a detector."""
