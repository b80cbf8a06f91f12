"""What the benchmark is made of: the two contestants, what they work on, and the ways to measure them."""
