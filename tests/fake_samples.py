"""Plays `dpo_kit.tools.samples`; see `tests.fake_run`."""

from __future__ import annotations

from tests.fake_run import main

if __name__ == "__main__":
    main()
