"""Checkpoints of other tools as checkpoints of this one."""
