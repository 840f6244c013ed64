"""The functions of the public Python API, which the commands call; `tron_cli` re-exports them."""
