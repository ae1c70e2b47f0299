"""`python -m lavin_rt` is `lavin-rt`."""

import sys

from lavin_rt.cli import main

if __name__ == "__main__":
    sys.exit(main())
