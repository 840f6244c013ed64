"""Measurements of tron: accuracy on real data, and speed."""

import tron_cli  # noqa: F401 - before torch, whose threads wait as it says
