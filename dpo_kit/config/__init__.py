"""The typed configuration: the seed's YAML, its errors, its paths, and the notebook's parameters.

`load` a params file, or turn the parameters of a notebook into a configuration with `from_notebook`. What
comes back is a tree of plain dataclasses in which every reference is resolved and every field checked; a
mistake is a `ConfigError` that lists all problems at once.

Deliberately not here: torch, devices, tokenizers, data. The same configuration loads on any machine.
"""

from dpo_kit.config.checks import Backend, check, name_problem, parse_backend
from dpo_kit.config.load import from_tree, load, to_tree, to_yaml
from dpo_kit.config.parameters import from_notebook, parameter_names
from dpo_kit.config.paths import BUILTIN_NAMES, find_path, project_root, resolve_path
from dpo_kit.config.schema import Config, field_names
from dpo_kit.config.values import read_list

__all__ = [
    "BUILTIN_NAMES",
    "Backend",
    "Config",
    "check",
    "field_names",
    "find_path",
    "from_notebook",
    "from_tree",
    "load",
    "name_problem",
    "parameter_names",
    "parse_backend",
    "project_root",
    "read_list",
    "resolve_path",
    "to_tree",
    "to_yaml",
]
