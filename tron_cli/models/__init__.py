"""Networks: packed batch -> hidden states, one file per network."""
