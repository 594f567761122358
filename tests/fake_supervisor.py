"""The real supervisor over the fake processes: `python -m tests.fake_supervisor RUN_DIR [--owner PID@START]...`."""

from __future__ import annotations

import functools
import sys

from dpo_kit.supervise import supervisor

MODULES = {
    "prepare_module": "tests.fake_prepare",
    "worker_module": "tests.fake_worker",
    "samples_module": "tests.fake_samples",
}

if __name__ == "__main__":
    supervisor.supervise = functools.partial(supervisor.supervise, **MODULES)
    sys.exit(supervisor.main())
