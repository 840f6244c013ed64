"""Files of events to columns."""
