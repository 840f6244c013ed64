"""Evaluation: exact ranks, figures, comparison of checkpoints, and files."""
