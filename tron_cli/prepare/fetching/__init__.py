"""The public sources: find, fetch, unpack."""
