"""tron: train and evaluate session-based recommenders on catalogues of millions of items."""

import os

# Huge pages for large tensors, which PyTorch asks for when this is set before its first one: random
# rows of a table are found faster, and a step's matrices come without thousands of page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
