"""Negatives: weights, draws, lookups and logits."""
