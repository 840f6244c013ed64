"""Serving: recommendations and similar items from a checkpoint, in original item ids."""
