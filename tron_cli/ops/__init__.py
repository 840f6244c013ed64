"""Arithmetic fitted to the machine; each operation stands beside its plain form."""
