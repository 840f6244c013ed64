"""Sources of datasets, one per file."""
