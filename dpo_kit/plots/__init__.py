"""Charts of runs, as Plotly figures and as pictures of them.

Deliberately not here: the figures behind the charts (view/analysis).
"""

from dpo_kit.plots.charts import (
    HEIGHT,
    WIDTH,
    describe,
    live,
    logps,
    loss,
    mimebundle,
    refresh,
    reward_grid,
    rewards,
)

__all__ = [
    "HEIGHT",
    "WIDTH",
    "describe",
    "live",
    "logps",
    "loss",
    "mimebundle",
    "refresh",
    "reward_grid",
    "rewards",
]
