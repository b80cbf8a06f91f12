"""What happens around a detector: training, checkpoints, evaluation, and what is told about them."""
