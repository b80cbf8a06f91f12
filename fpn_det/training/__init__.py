"""The training loop and everything that moves the weights."""
