"""tron: train and evaluate session-based recommenders on catalogues of millions of items."""

__version__ = "0.1.0"
