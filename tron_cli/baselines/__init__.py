"""Simple methods that every model must beat: fitted in seconds, ranked as exactly as the models.

One file an algorithm. Nothing is imported here: only `ease` needs torch, and whoever prepares data
does without it.
"""
