"""PyTorch's shared libraries, loaded in a thread while this process still imports other things.

A fifth of `import torch` is the system's loader at work on half a gigabyte of libraries, which needs no Python. Knows
their names only; whatever is unusual is left to the import itself.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import sys
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

# As the import itself loads them: the first one shares its symbols with what comes later.
LIBRARIES = (("libtorch_global_deps.so", ctypes.RTLD_GLOBAL), ("libtorch_python.so", ctypes.RTLD_LOCAL))
FOR_GPU = "libtorch_cuda.so"  # builds with it look for further libraries in places that only the import knows


def begin() -> None:
    """Begin to load them; to be called as early as possible where torch will be needed. Never raises."""
    if "torch" not in sys.modules and sys.platform == "linux":
        threading.Thread(target=_load, name="torch libraries", daemon=True).start()


def _load() -> None:
    try:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return
        folder = Path(spec.origin).parent / "lib"
        if (folder / FOR_GPU).exists():
            return
        for name, mode in LIBRARIES:
            ctypes.CDLL(str(folder / name), mode)
    except (OSError, ImportError, ValueError) as error:
        logger.debug("torch's libraries are left to its import: %s", error)
