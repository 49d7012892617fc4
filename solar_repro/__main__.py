"""`python -m solar_repro` is the `solar-repro` command."""
import sys

from solar_repro.reports.cli import main

if __name__ == '__main__':
    sys.exit(main())
