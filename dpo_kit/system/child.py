"""Runs a module as a child that ends with its parent: `python -m dpo_kit.system.child MODULE ARGUMENT...`.

The tie is made before the module is imported: importing torch takes seconds, in which a killed parent would
leave the child behind.

Deliberately not here: anything else.
"""

from __future__ import annotations

import gc
import runpy
import sys

from dpo_kit.redaction import guard_output
from dpo_kit.system.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    guard_output()
    del sys.argv[0]
    if sys.argv[0].startswith("dpo_kit."):
        # Until `processes.imported`: imports throw nothing away, and looking for it takes a fifth of their time.
        gc.disable()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
