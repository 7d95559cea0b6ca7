"""The raw figures as JSON: written after every run, so that nothing is lost, and read again to continue or to report."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.cpu.ceilings import Ceilings
from bench.cpu.results import Record


@dataclass(slots=True)
class Store:
    """All records of one machine and one size of the workloads, in a file."""

    path: Path
    machine: str
    quick: bool
    commit: str
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Keep a record with the time and quire's version, and write all of them."""
        self.records.append(replace(record, at=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), commit=self.commit))
        text = json.dumps(
            {
                "machine": self.machine,
                "quick": self.quick,
                "records": [rounded(asdict(record)) for record in self.records],
            },
            indent=1,
        )
        fresh = self.path.with_suffix(f".{os.getpid()}")
        fresh.write_text(text + "\n")
        fresh.rename(self.path)


def rounded(value: Any) -> Any:
    """Five digits say all; nothing else changes."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value


def open_store(path: Path, machine: str, quick: bool, commit: str) -> Store:
    """A new store, or the one in the file. Raises ValueError when the file holds what cannot be compared."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return Store(path, machine, quick, commit)
    found = json.loads(path.read_text())
    if (found["machine"], found["quick"]) != (machine, quick):
        raise ValueError(
            f"{path} holds figures of {found['machine']}{', quick' if found['quick'] else ''}; "
            "name another file with --json."
        )
    return Store(path, machine, quick, commit, [read_record(item) for item in found["records"]])


def read_record(item: dict[str, Any]) -> Record:
    """A record as it was written."""
    ceilings = None if item["ceilings"] is None else Ceilings(**item["ceilings"])
    return Record(**(item | {"ceilings": ceilings, "samples": tuple(item["samples"])}))
