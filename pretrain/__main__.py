"""`python -m pretrain` is the same as `pretrain`."""

import sys

from pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
