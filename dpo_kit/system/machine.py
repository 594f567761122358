"""What this machine has: CUDA devices, free memory, free disk; found without torch and without a CUDA context.

The kernel of a notebook must never hold a GPU, so it asks the driver's management library (NVML) by ctypes.

Deliberately not here: choosing how many devices to use (launch), what a run needs (model/costs).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import psutil


def visible_devices() -> int:
    """Number of CUDA devices that a rank would see.

    0 where torch is a build without CUDA or there is no driver; `CUDA_VISIBLE_DEVICES` is read as CUDA does:
    entries up to the first one that names no device.
    """
    if not torch_has_cuda():
        return 0
    present = len(device_names())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or present == 0:
        return present
    count = 0
    for entry in chosen.split(","):
        entry = entry.strip()
        if entry.isdigit() and int(entry) >= present:
            break
        if not entry.isdigit() and not entry.startswith(("GPU-", "MIG-")):
            break
        count += 1
    return count


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
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return _names_by_command()
    if nvml.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint(0)
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        return [_name(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()


def _name(nvml: ctypes.CDLL, index: int) -> str:
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return "unknown"
    if nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(96)) != 0:
        return "unknown"
    return name.value.decode("utf-8", "replace")


def _names_by_command() -> list[str]:
    """The same through `nvidia-smi`, for drivers whose library lies elsewhere (WSL2)."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = found.stdout.splitlines() if found.returncode == 0 else []
    return [match[1] for line in lines if (match := re.match(r"GPU \d+: (.*?)(?: \(UUID|$)", line))]


_CGROUP = Path("/sys/fs/cgroup")


def free_bytes_of_rank(num_ranks: int, *, on_cuda: bool) -> int:
    """Memory that one rank may take: its part of the host's on the CPU, else what the fullest device has left.

    Args:
        num_ranks: ranks on this machine.
        on_cuda: each has a device of its own.
    """
    if on_cuda:
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
