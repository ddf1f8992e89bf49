"""`python -m tinkex` is `tinkex`."""

from __future__ import annotations

import sys

from tinkex.cli import main

if __name__ == "__main__":
    sys.exit(main())
