"""Where relative paths of a configuration lie, whoever started the notebook and in which folder.

The project root is the nearest parent of the working directory that holds `params/`, else the source tree
of an editable install, else the working directory. A path to something that must exist is looked for under
the root and under the working directory; two different hits are an error and not a guess.

Deliberately not here: whether a name is on a model hub, and creating folders.
"""

from __future__ import annotations

from pathlib import Path

from dpo_kit.config.schema import Config
from dpo_kit.errors import ConfigError

# Names that come with the kit; a folder of the same name is reached as ./tiny-random.
BUILTIN_NAMES = frozenset({"smollm2-135m-instruct", "tiny-random", "sample"})


def project_root(start: str | Path | None = None) -> Path:
    """The folder against which relative paths resolve.

    Args:
        start: where to begin looking, the working directory by default.
    """
    here = Path(start).resolve() if start is not None else Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params").is_dir():
            return folder
    source = Path(__file__).resolve().parents[2]
    return source if (source / "params").is_dir() else here


def resolve_path(text: str | Path, root: str | Path) -> Path:
    """An absolute path: `~` expanded, relative paths taken from the root. Nothing needs to exist."""
    path = Path(text).expanduser()
    return path if path.is_absolute() else Path(root) / path


def find_path(name: str, text: str | Path, root: str | Path) -> Path | None:
    """The existing file or folder that a path means, absolute; None when there is none.

    Args:
        name: the field or option that holds it, for the error.
        text: absolute, or relative to the root or else to the working directory.
        root: the project root.

    Raises:
        ConfigError: it exists under the root and, as something else, under the working directory.
    """
    candidates = [resolve_path(text, root), resolve_path(text, Path.cwd())]
    try:
        found = [path for path in candidates if path.exists()]
    except (OSError, ValueError):  # a name too long or with a NUL is no path at all
        return None
    if not found:
        return None
    if len(found) == 2 and not found[0].samefile(found[1]):
        both = f"{found[0]} and {found[1]}"
        raise ConfigError([f"{name} = {str(text)!r} is both {both}; give the absolute path of the one meant"])
    return Path(*found[0].parts) if ".." not in found[0].parts else found[0].resolve()


def named_models(config: Config) -> dict[str, str]:
    """The fields that name models; a path that several fields share stands under the first one only."""
    fields = {
        "actor.path": config.actor.path,
        "ref.path": config.ref.path,
        "tokenizer_path": config.tokenizer_path,
    }
    first = {path: field for field, path in reversed(fields.items())}
    return {field: path for field, path in fields.items() if first[path] == field}
