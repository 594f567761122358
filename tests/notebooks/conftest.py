"""nbval on the recordings: everything they write goes below one temporary folder."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from tests.record_notebooks import private_folders

# Set when this file is imported, because the kernels that nbval starts see the environment and no fixture.
_folder = tempfile.mkdtemp(prefix="dpo-kit-nbval-")
os.environ.update(private_folders(Path(_folder)))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
