"""`python -m dpo_kit ...` is the command `dpo-kit ...`."""

from __future__ import annotations

import sys

from dpo_kit.cli import main

if __name__ == "__main__":
    sys.exit(main())
