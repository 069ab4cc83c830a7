"""`python -m hpcft` is the same as `hpcft`."""

import sys

from hpcft.cli import main

sys.exit(main())
