"""CUDA devices without torch: this machine need not have one."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pynvml
import pytest

from dpo_kit.system import machine

UUIDS = ["GPU-1a11", "GPU-1b22", "GPU-2c33", "GPU-3d44"]
MIG = "MIG-7e55"


@pytest.fixture
def four(monkeypatch):
    """A driver with four devices; a handle is the device's UUID. The second is full, with somebody else's work."""
    free = dict(zip([*UUIDS, MIG], [70, 0, 60, 50, 5], strict=True))

    def by_uuid(uuid):
        if uuid not in free:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    fakes = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(UUIDS),
        "nvmlDeviceGetHandleByIndex": lambda index: UUIDS[index],
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetUUID": lambda handle: handle,
        "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(free=free[handle]),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(pynvml, name, fake)
    monkeypatch.setattr(machine, "torch_has_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_all_devices_are_visible_by_default(four):
    assert machine.device_names() == ["NVIDIA H200"] * 4
    assert machine.visible_devices() == 4
    assert machine.free_device_bytes() == 0


@pytest.mark.parametrize(
    ("chosen", "count", "free"),
    [
        ("", 0, None),
        ("-1", 0, None),
        ("x", 0, None),
        ("0", 1, 70),
        ("2,0", 2, 60),
        ("0, 1", 2, 0),
        ("0,-1,1", 1, 70),
        ("0,7,1", 1, 70),
        ("0,,1", 1, 70),
        ("0,0", 0, None),
        ("GPU-2c33,GPU-1a11", 2, 60),
        ("GPU-2,GPU-3d, GPU-1b", 3, 0),
        ("GPU-2,GPU-1,GPU-3", 1, 60),  # GPU-1 is two of them
        ("GPU-2,GPU-2c33", 0, None),
        ("GPU-3,GPU-9,GPU-1a", 1, 50),
        ("GPU-3,0", 1, 50),
        ("0,GPU-3", 1, 70),
        (MIG, 1, 5),
        (f"{MIG},MIG-8f66", 1, 5),
        ("MIG-8f66", 0, None),
    ],
)
def test_the_environment_chooses_as_cuda_reads_it(four, chosen, count, free):
    four.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert (machine.visible_devices(), machine.free_device_bytes()) == (count, free)


def test_a_full_device_of_somebody_else_refuses_no_run(four):
    four.setattr(machine, "free_host_bytes", lambda: 8)
    assert machine.free_bytes_of_rank(2, on_cuda=True) == 0
    four.setenv("CUDA_VISIBLE_DEVICES", "GPU-3d44,GPU-1a11")
    assert machine.free_bytes_of_rank(2, on_cuda=True) == 50
    assert machine.free_bytes_of_rank(2, on_cuda=False) == 4


def test_a_torch_without_cuda_sees_none(four):
    four.setattr(machine, "torch_has_cuda", lambda: False)
    assert machine.visible_devices() == 0


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount"])
@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_without_a_driver_that_answers_there_is_no_device(four, call, error):
    def fail():
        raise pynvml.NVMLError(error)

    four.setattr(pynvml, call, fail)
    assert (machine.visible_devices(), machine.device_names()) == (0, [])
    assert machine.free_device_bytes() is None


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("cuda: Optional[str] = None\n", False),
        ("cuda: Optional[str] = '13.0'\n", True),
        ("cuda = '12.8'\n", True),
    ],
)
def test_the_build_of_torch_is_read_from_its_version_file(tmp_path, monkeypatch, text, has):
    (tmp_path / "version.py").write_text(f"debug = False\n{text}hip = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: spec)
    assert machine.torch_has_cuda() is has


def test_asking_does_not_import_torch():
    code = "import sys; from dpo_kit.system import machine; machine.device_names(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
