"""CUDA devices that torch would see, found without importing torch and without a CUDA context.

The kernel of a notebook must never hold a GPU, so it asks the driver's management library (NVML) by ctypes.

Deliberately not here: choosing how many to use (launch), memory (a later estimate).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
from pathlib import Path


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
