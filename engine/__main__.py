"""`python -m r1.engine` is `r1`, so that torchrun can start it."""

import sys

from r1.engine.cli import main

if __name__ == "__main__":  # checkpoint writers spawn processes that import this file
    sys.exit(main())
