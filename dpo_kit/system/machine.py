"""What this machine has: CUDA devices, free memory, free disk; found without torch and without a CUDA context.

The kernel of a notebook must never hold a GPU, so the driver's management library (NVML) is asked.

Deliberately not here: choosing how many devices to use (launch), what a run needs (model/costs).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

_T = TypeVar("_T")


def visible_devices() -> int:
    """Number of CUDA devices that a rank would see; 0 where torch is a build without CUDA or no driver answers."""
    return _ask(lambda nvml: len(_visible_handles(nvml)), 0) if torch_has_cuda() else 0


def too_many(wanted: int, visible: int) -> str:
    """What is wrong with a number of devices (`cluster.n_gpus_per_node`); empty when there are so many."""
    if wanted <= visible:
        return ""
    return (
        f"cluster.n_gpus_per_node = {wanted} is more than the {visible} CUDA devices that are visible here;"
        f" use {visible}{' (CPU ranks)' if visible == 0 else ''}, or auto"
    )


def torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA; read from its version file, torch is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    try:
        return re.search(r"^cuda\b[^=]*=\s*['\"]", version.read_text("utf-8"), re.MULTILINE) is not None
    except OSError:
        return False


def device_names() -> list[str]:
    """Names of all NVIDIA devices of this machine, visible or not; empty without a driver."""
    return _ask(lambda nvml: [nvml.nvmlDeviceGetName(handle) for handle in _all_handles(nvml)], [])


def free_device_bytes() -> int | None:
    """Free memory of the fullest visible CUDA device; None where the driver does not tell."""
    free: list[int] = _ask(
        lambda nvml: [nvml.nvmlDeviceGetMemoryInfo(handle).free for handle in _visible_handles(nvml)], []
    )
    return min(free, default=None)


def _ask(question: Callable[[Any], _T], otherwise: _T) -> _T:
    """The driver's answer; `otherwise` where there is no driver or it has none."""
    import pynvml  # 0.06 s, and most processes never ask

    try:
        pynvml.nvmlInit()
        try:
            return question(pynvml)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return otherwise


def _all_handles(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]


def _visible_handles(nvml: Any) -> list[Any]:
    """The devices that CUDA_VISIBLE_DEVICES names, in its order and read as CUDA reads it; all where it is not set.

    An entry is an index, a `GPU-` UUID or a beginning of one that no other device shares, or a `MIG-` UUID. Entries
    count up to the first one that names no device or is of another kind than the first; a device named twice leaves
    none; a process gets one MIG device, the first.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    handles = _all_handles(nvml)
    if chosen is None:
        return handles
    entries = [entry.strip() for entry in chosen.split(",")]
    if entries[0].startswith("MIG-"):
        return [nvml.nvmlDeviceGetHandleByUUID(entries[0])]
    by_uuid = entries[0].startswith("GPU-")
    names = [nvml.nvmlDeviceGetUUID(handle) if by_uuid else str(i) for i, handle in enumerate(handles)]
    fits = str.startswith if by_uuid else str.__eq__
    visible: list[int] = []
    for entry in entries:
        named = [i for i, name in enumerate(names) if entry and fits(name, entry)]
        if len(named) != 1:
            break
        if named[0] in visible:
            return []
        visible += named
    return [handles[i] for i in visible]


_CGROUP = Path("/sys/fs/cgroup")


def free_bytes_of_rank(num_ranks: int, *, on_cuda: bool) -> int:
    """Memory that one rank may take: its part of the host's on the CPU, else what the fullest device has left.

    Args:
        num_ranks: ranks on this machine.
        on_cuda: each has a device of its own.
    """
    if on_cuda and (on_devices := free_device_bytes()) is not None:
        return on_devices
    return free_host_bytes() // num_ranks


def free_host_bytes() -> int:
    """Memory that can be had without swapping, within the limit of this process's control group."""
    free = psutil.virtual_memory().available
    # It may set no limit ("max"), be of another kind, or belong to another system.
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        free = min(free, limit - int((_CGROUP / "memory.current").read_text()))
    return max(0, free)


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is, or will be."""
    return shutil.disk_usage(nearest_folder(folder)).free


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed, files that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
    return total


def size_text(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
