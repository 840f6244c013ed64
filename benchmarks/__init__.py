"""Measurements of tron: accuracy on real data, and speed."""
