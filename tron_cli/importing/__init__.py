"""Import of other tools' checkpoints."""
