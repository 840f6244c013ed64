"""`python -m tron_cli` is `tron`."""

from tron_cli.cli import main

main()
