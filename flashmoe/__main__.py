"""`python -m flashmoe` is `flashmoe`."""

import sys

from flashmoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
