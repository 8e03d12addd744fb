"""``python -m minidiff``: the command line."""

from minidiff.cli import main

main()
