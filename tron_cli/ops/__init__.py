"""Arithmetic optimized for the machine; each operation has its plain form beside it."""
