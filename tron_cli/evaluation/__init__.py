"""Evaluation: exact ranks, figures, comparison, files."""
