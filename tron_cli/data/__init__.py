"""Prepared datasets, the histories of their events, and packed batches."""
