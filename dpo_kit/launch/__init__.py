"""Starting runs: find the devices, refuse what cannot run, make the folder, start the supervisor.

    run = launch.start(settings)                   returns at once; attaches when its run lives
    code = launch.run_in_foreground(settings)      what `dpo-kit train` does
    results = launch.spawn(my_module.fn, 1, 2)     a function on N ranks for a cell

Deliberately not here: what happens to a started run (supervise, runs).
"""

from dpo_kit.launch.local import resume_in_foreground, run_in_foreground, start
from dpo_kit.launch.on_ranks import spawn
from dpo_kit.launch.trial import live
from dpo_kit.launch.world import check_alone, plan_world, resolve_world
from dpo_kit.supervise.owner import is_headless

__all__ = [
    "check_alone",
    "is_headless",
    "live",
    "plan_world",
    "resolve_world",
    "resume_in_foreground",
    "run_in_foreground",
    "spawn",
    "start",
]
