"""What is free on this machine: memory for a rank, disk below a folder; what a folder takes. No torch, no CUDA context.

Not here: what a run needs (`memory`, `estimate`), how many devices there are (`devices`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from pathlib import Path

import psutil

from dpo_kit.config import Config

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes_of_rank(config: Config, num_ranks: int) -> int:
    """Memory that one rank may take: its part of the host's on the CPU, else what the fullest device has left.

    Args:
        config: devices resolved: `cluster.n_gpus_per_node` is a number.
        num_ranks: ranks on this machine.
    """
    if config.cluster.n_gpus_per_node:
        on_devices = free_device_bytes()
        if on_devices is not None:
            return on_devices
    return free_host_bytes() // num_ranks


def free_host_bytes() -> int:
    """Memory that can be had without swapping, within the limit of this process's control group."""
    free = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # another kind of control group, or another system
        pass
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


def free_device_bytes() -> int | None:
    """Free memory of the fullest visible CUDA device, by the driver's library; None where it does not tell."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        count = ctypes.c_uint(0)
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return None
        free = [_free(nvml, index) for index in _visible(count.value)]
    finally:
        nvml.nvmlShutdown()
    known = [value for value in free if value is not None]
    return min(known) if known else None


def _visible(count: int) -> list[int]:
    """Device numbers that CUDA_VISIBLE_DEVICES names; all where it is not set or names them by UUID."""
    entries = [e.strip() for e in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    named = [int(e) for e in entries if e.isdigit() and int(e) < count]
    return named or list(range(count))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _free(nvml: ctypes.CDLL, index: int) -> int | None:
    handle, memory = ctypes.c_void_p(), _Memory()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return None
    if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    return int(memory.free)
