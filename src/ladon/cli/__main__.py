"""`python -m ladon.cli`."""

from ladon.cli.main import main

main()
