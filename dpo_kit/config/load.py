"""Reading a configuration: file, overrides, interpolation, one walk that collects every problem.

The order of work: parse YAML -> apply overrides -> fill in defaults -> resolve `${...}` -> check and coerce
every key against the schema -> check contradictions -> build the dataclasses -> resolve paths.

Deliberately not here: the notebook's parameters (`parameters`), and what a field means (`schema`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from omegaconf import OmegaConf

from dpo_kit.config import schema
from dpo_kit.config.checks import contradictions
from dpo_kit.config.hints import unknown_key
from dpo_kit.config.paths import BUILTIN_NAMES, find_path, project_root, resolve_path
from dpo_kit.config.scalars import is_empty, is_null, parse_scalar, parse_yaml
from dpo_kit.config.schema import Config
from dpo_kit.config.tree import check_tree, plain_tree
from dpo_kit.config.values import show
from dpo_kit.errors import ConfigError


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a params file.

    Keys of the seed's system that mean nothing here are listed in one `UserWarning`.

    Args:
        path: absolute, or relative to the project root or else to the working directory.
        overrides: dotted assignments, `actor.beta=0.2`; later ones win.

    Raises:
        ConfigError: with every problem of the file and the overrides at once.
    """
    root = project_root()
    problems: list[str] = []
    tree = plain_tree(read_params(path, root), f"config {str(path)!r}", problems)
    return configure(tree, overrides, root, problems)


def from_tree(tree: Mapping[str, Any], overrides: Iterable[str] = (), *, root: Path | None = None) -> Config:
    """Build a configuration from the keys of a params file.

    An empty top-level value (`scalars.is_empty`) is the same as a key left out, because a notebook parameter
    cannot say it otherwise.

    Args:
        tree: the keys as YAML or papermill read them, or `to_tree(config)`. Not changed.
        overrides: dotted assignments. In `to_tree(config)` nothing refers to anything any more: a new
            `actor.path` there leaves `ref.path` as it is.
        root: the project root, found from the working directory by default.

    Raises:
        ConfigError: with every problem at once.
    """
    problems: list[str] = []
    plain = plain_tree(tree, "configuration", problems)
    return configure(plain, overrides, root or project_root(), problems)


def configure(tree: dict[str, Any], overrides: Iterable[str], root: Path, problems: list[str]) -> Config:
    """The configuration that a plain tree and overrides mean; one warning, for the caller's caller, names what
    was ignored.

    Args:
        tree: from `tree.plain_tree`; changed in place.
        overrides: dotted assignments.
        root: the project root.
        problems: what was found wrong so far.

    Raises:
        ConfigError: with every problem, the ones given included.
    """
    for key in [key for key, value in tree.items() if is_empty(value)]:
        del tree[key]
    problems += apply_overrides(tree, overrides)
    walk = check_tree(tree)
    problems += walk.problems
    config = _build(Config, walk.tree)
    problems += contradictions(config, walk.bad)
    if not problems:
        problems += _resolve_paths(config, root)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    if walk.ignored:
        names = ", ".join(dict.fromkeys(walk.ignored))
        warnings.warn(f"ignored: {names} (keys of the seed's system without a meaning here)", stacklevel=3)
    return config


def read_params(path: str | Path, root: Path) -> dict[str, Any]:
    """The keys of a params file as plain values, nothing checked but the YAML itself.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, a key given twice, or no mapping.
    """
    named, found = f"config {str(path)!r}", find_path("config", path, root)
    if found is None:
        places = dict.fromkeys([resolve_path(path, root), resolve_path(path, Path.cwd())])
        raise ConfigError([f"{named} does not exist; looked for {' and '.join(map(str, places))}"])
    if found.is_dir():
        raise ConfigError([f"{named} is a folder; name the YAML file in it"])
    try:
        data = found.read_bytes()
        tree = parse_yaml(data.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError([f"{named} cannot be read: {error.strerror or error}"]) from None
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise ConfigError(
            [f"{named}, line {line}: byte {byte:#04x} is not UTF-8; save it as UTF-8"]
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError([f"{named}{_yaml_problem(error)}"]) from None
    if tree is None:
        raise ConfigError([f"{named} is empty; see params/demo.yaml for a complete one"])
    if not isinstance(tree, dict):
        raise ConfigError([f"{named} holds {show(tree)}, not `key: value` lines"])
    return tree


def _yaml_problem(error: Exception) -> str:
    """`, line 3, column 5: what is wrong` on one line."""
    if isinstance(error, RecursionError):
        return ": is nested too deeply"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    text = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    return f"{where}: {' '.join(str(text).split())}" + (f" ({context})" if context else "")


def _build(cls: type, tree: dict[str, Any]) -> Any:
    """The dataclasses of a checked tree; a key left out because it is wrong holds its default."""
    values = {}
    for name, (hint, _) in schema.section_fields(cls).items():
        inner = schema.section_type(hint)
        if inner and isinstance(tree.get(name), dict):
            values[name] = _build(inner, tree[name])
        elif name in tree:
            values[name] = tree[name]
    return cls(**values)


def _resolve_paths(config: Config, root: Path) -> list[str]:
    """Make `cluster.fileroot` absolute, and every other path that names an existing file or folder."""
    config.tokenizer_path = config.tokenizer_path or config.actor.path
    fileroot = resolve_path(config.cluster.fileroot, root)
    config.cluster.fileroot = str(fileroot)
    problems = []
    if fileroot.exists() and not fileroot.is_dir():
        problems.append(f"cluster.fileroot = {str(fileroot)!r} is a file; give a folder for the runs")
    places: list[tuple[str, Any, str]] = [
        ("actor.path", config.actor, "path"),
        ("ref.path", config.ref, "path"),
        ("tokenizer_path", config, "tokenizer_path"),
        ("train_dataset.path", config.train_dataset, "path"),
    ]
    if config.valid_dataset is not None and config.valid_dataset.path:
        places.append(("valid_dataset.path", config.valid_dataset, "path"))
    for name, section, key in places:
        text = getattr(section, key)
        if text in BUILTIN_NAMES:
            continue
        try:
            found = find_path(name, text, root)
        except ConfigError as error:
            problems += error.problems
            continue
        if found is not None:
            setattr(section, key, str(found))
    return problems


def to_tree(config: Config) -> dict[str, Any]:
    """A configuration as plain dicts and values."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """A configuration as YAML text; `load` of it gives an equal one."""

    def literal(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: literal(inner) for key, inner in value.items()}
        return value.replace("${", "\\${") if isinstance(value, str) else value

    return OmegaConf.to_yaml(OmegaConf.create(literal(to_tree(config))))


FORM = "write key=value with the dotted key, e.g. actor.beta=0.2"


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Set each override in the tree, in order, and return the problems, one line each.

    A value for a text field is taken literally, without YAML (`trial_name=no` stays `no`), except what means
    nothing (`null`, `~`, `None`) and `${...}`. Any other value is read as YAML. A mapping is merged into the
    section that it is for.

    Args:
        tree: plain dicts and values; changed in place.
        overrides: `a.b=value` strings (one string is one override).
    """
    problems = []
    for text in [overrides] if isinstance(overrides, str) else overrides:
        try:
            name, value = parse_override(text)
            set_dotted(tree, name, value)
        except ValueError as error:
            problems.append(str(error))
    return problems


def parse_override(text: str) -> tuple[str, Any]:
    """The dotted name and the value of one override.

    Raises:
        ValueError: it is no assignment, or its key does not exist.
    """
    if not isinstance(text, str):
        raise ValueError(f"override {show(text)} is not text; {FORM}")
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name or name[0] in "+~-" or not all(name.split(".")):
        raise ValueError(f"override {text!r} is not an assignment; {FORM}")
    hint = _hint(name)
    is_text = get_origin(hint) is not list and set(get_args(hint) or (hint,)) - {NoneType} == {str}
    if hint is None or "${" in value or is_text:
        return name, (value if hint is not None or "${" in value else parse_scalar(value))
    if is_null(value):
        return name, None
    try:
        parsed = parse_yaml(value)
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"{name} = {show(value)} cannot be read: {problem}") from None
    if schema.section_type(hint) and not isinstance(parsed, dict | NoneType):
        raise ValueError(f"{name} = {show(value)} is not a section; give {name}.key=value, or null")
    return name, parsed


def _hint(name: str) -> Any:
    """The type hint of a dotted name, None for an ignored key of the seed's system.

    Raises:
        ValueError: there is no such key; names the nearest.
    """
    if schema.is_foreign(name):
        return None
    cls: type | None = schema.Config
    hint: Any = None
    parts = name.split(".")
    for i, part in enumerate(parts):
        here = ".".join(parts[: i + 1])
        if cls is None:
            raise ValueError(f"{here} is not a known key: {'.'.join(parts[:i])} is a value and not a section")
        known = schema.section_fields(cls)
        if part not in known:
            raise ValueError(unknown_key(here, known))
        hint = known[part][0]
        cls = schema.section_type(hint)
    return hint


def set_dotted(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set one dotted name in a tree of plain dicts, making the sections on the way; mappings are merged.

    Raises:
        ValueError: a section on the way is a reference such as `${train_dataset}`.
    """
    *sections, leaf = name.split(".")
    node = tree
    for i, part in enumerate(sections):
        inner, here = node.get(part), ".".join(sections[: i + 1])
        if isinstance(inner, str) and "${" in inner:
            raise ValueError(
                f"{name} cannot be set because {here} is the reference {inner}; spell {here} out, or change "
                "what it refers to"
            )
        if inner is not None and not isinstance(inner, dict):
            raise ValueError(f"{here} = {show(inner)} is not a section; give keys and values")
        if inner is None:
            inner = node[part] = {}
        node = inner
    if isinstance(value, dict) and isinstance(node.get(leaf), dict | str):
        for key, inner in value.items():
            set_dotted(tree, f"{name}.{key}", inner)
    else:
        node[leaf] = value
