"""Files of the public sources: find, download, unpack."""
