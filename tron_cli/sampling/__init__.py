"""Negatives: how they are weighted, drawn, looked up and compared."""
