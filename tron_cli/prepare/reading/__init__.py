"""Readers of files of events into columns."""
