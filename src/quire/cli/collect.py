"""quire collect-env: versions, hardware and settings, as text to paste into a report. Shows no key and no path."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from quire.cli.flags import FlagParser

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "msgspec", "fastapi")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    FlagParser("quire collect-env", "Print versions and hardware, for reports.").parse(argv)
    for name, value in facts().items():
        print(f"{name + ':':<18} {value}")
    return 0


def facts() -> dict[str, str]:
    """Everything that is shown, in order."""
    # Imported here: torch takes a second, which the parser above should not cost.
    import torch

    from quire import __version__, env
    from quire.worker.device import Device

    cpu = Device("cpu")
    memory = cpu.memory()
    found = {"quire": __version__, "python": platform.python_version(), "system": platform.platform()}
    found |= {name: _version(name) for name in PACKAGES}
    found["processor"] = _processor()
    found["threads"] = f"{cpu.threads()} usable"
    found["memory"] = f"{memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    found["instruction sets"] = torch.backends.cpu.get_cpu_capability()
    found["cpu level"] = env.cpu_level() or "not forced"
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found["native library"] = ", ".join(sorted(_native_libraries())) or "not built"
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _native_libraries() -> list[str]:
    import quire.kernels.cpu

    return [file.name for folder in quire.kernels.cpu.__path__ for file in Path(folder).glob("*.so")]
