"""`python -m lavin_kernels.static`: see `lavin_kernels.static.check`."""

import sys

from lavin_kernels.static.check import main

sys.exit(main())
