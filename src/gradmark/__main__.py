"""``python -m gradmark``."""

from gradmark.cli import main

main()
