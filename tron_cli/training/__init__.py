"""Training: the loop and all it calls."""
