"""`python -m kvserve.cli`."""

import sys

from kvserve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
