"""`python -m midskip`, which is `midskip`."""

import sys

from midskip.cli import main

if __name__ == "__main__":
    sys.exit(main())
