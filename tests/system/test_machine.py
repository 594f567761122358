"""CUDA devices without torch: this machine need not have one."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dpo_kit.system import machine


class FakeNvml:
    """The five calls of the driver's library that are used."""

    def __init__(self, names, status=0):
        self.names, self.status = names, status

    def nvmlInit_v2(self):
        return self.status

    def nvmlShutdown(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.names)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetName(self, handle, name, size):
        name.value = self.names[handle.value - 1].encode()
        return 0


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(machine, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNvml(["NVIDIA H200"] * 4))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_all_devices_are_visible_by_default(four):
    assert machine.device_names() == ["NVIDIA H200"] * 4
    assert machine.visible_devices() == 4


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("2,0", 2),
        ("0, 1", 2),
        ("0,-1,1", 1),
        ("0,7,1", 1),
        ("GPU-1a,GPU-2b", 2),
        ("x", 0),
    ],
)
def test_the_environment_chooses_as_cuda_reads_it(four, chosen, count):
    four.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert machine.visible_devices() == count


def test_a_torch_without_cuda_sees_none(four):
    four.setattr(machine, "torch_has_cuda", lambda: False)
    assert machine.visible_devices() == 0


def test_a_driver_that_does_not_answer_is_no_device(four):
    four.setattr(ctypes, "CDLL", lambda name: FakeNvml(["x"], status=9))
    assert machine.visible_devices() == 0


def test_without_the_library_the_command_is_asked(four):
    def missing(name):
        raise OSError(name)

    four.setattr(ctypes, "CDLL", missing)
    said = "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA L4 (UUID: GPU-2)\n"
    four.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0, stdout=said))
    assert machine.device_names() == ["NVIDIA H200", "NVIDIA L4"]
    four.setattr(subprocess, "run", lambda *a, **k: missing("nvidia-smi"))
    assert machine.device_names() == []


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
    code = "import sys; from dpo_kit.system import machine; machine.visible_devices(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
