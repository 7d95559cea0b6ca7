"""ProvedPrograms: which step programs have been proved on this machine before, so that no start need prove them again.

A record is a file whose name is a hash of all that a proof depends on: every instruction of the program itself, which is
recorded anew at each start, the sources and libraries that run it, the processor, the weights and their format. It holds
nothing but a hash of the same: there is nothing in it that could be believed wrongly.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from quire import __version__, env
from quire.kernels.programs import Program
from quire.kernels.table import Ops
from quire.models.files.hub import ModelFiles
from quire.models.files.remembered import own_source, recall, remember, weight_identity

CPUINFO = Path("/proc/cpuinfo")


class ProvedPrograms:
    """The records of one load. `dtypes` are those of the model and of its pages, `threads` what its kernels run on."""

    def __init__(self, files: ModelFiles, dtypes: tuple[torch.dtype, ...], threads: int, ops: Ops) -> None:
        library = sys.modules.get("transformers")  # imported by now where it has a part in the model
        facts = {
            "quire": [__version__, own_source(), ops.packed_layout()],
            "libraries": [sys.version, torch.__version__, getattr(library, "__version__", None)],
            "machine": [_processor(), torch.backends.cpu.get_cpu_capability(), threads, torch.get_num_threads()],
            "model": [files.architecture, files.raw_config, files.rounding, [str(dtype) for dtype in dtypes]],
            "weights": [weight_identity(path) for path in files.weights],
        }
        self._facts = json.dumps(facts, sort_keys=True, default=str)

    def known(self, program: Program) -> bool:
        """Whether this program was proved before."""
        record = self._record(program)
        return record is not None and recall(self._path(record)) == record

    def note(self, program: Program) -> None:
        """The program has been proved now."""
        record = self._record(program)
        if record is not None:
            remember(self._path(record), record)

    def _record(self, program: Program) -> str | None:
        """None for a program that cannot be told by its text."""
        text = program.text()
        return None if text is None else hashlib.sha256(f"{self._facts}\0{text}".encode()).hexdigest()

    def _path(self, record: str) -> Path:
        return env.cache_folder() / "programs" / f"{record[:32]}.proved"


def _processor() -> list[str]:
    """What /proc/cpuinfo says of the first processor's kind; nothing elsewhere."""
    if not CPUINFO.is_file():
        return []
    first = CPUINFO.read_text().split("\n\n", 1)[0].splitlines()
    return [
        line for line in first if line.startswith(("vendor_id", "cpu family", "model", "stepping", "flags", "Features"))
    ]
