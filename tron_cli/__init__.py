"""tron: train and evaluate session-based recommenders on catalogues of millions of items."""

import os

# Huge pages for large tensors, which PyTorch asks for when this is set before its first one: random
# rows of a table are found faster, and a step's matrices come without thousands of page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# How long the threads of GNU OpenMP, which torch brings along and which reads this when it is
# loaded, spin before they sleep. Its own 300,000 turns keep a core from other trainings of the
# machine; sleeping at once costs a training that is alone a quarter of its speed.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

__version__ = "0.1.0"
