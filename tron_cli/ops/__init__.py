"""Arithmetic that knows the machine."""
