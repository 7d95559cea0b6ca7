"""Parts of torch that no step of a native model asks for: their code runs when somebody does.

A sixth of `import torch` describes every operation once more, for compilers and for tensors without data. Only programs of
quire's own leave that out, never one that imports quire. Which parts can wait was tried with the releases below: modules
of torch import one another in circles, so with other releases nothing waits. Imports no torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import threading
from collections.abc import Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

RELEASES = ("2.13.",)
LATE = frozenset({"torch._meta_registrations", "torch.distributions", "torch.export"})
WANT_ALL = frozenset({"torch._dynamo", "transformers", "triton"})  # they use what these parts register


class LateParts(MetaPathFinder, Loader):
    """Finds the late parts, and gives modules in their place that load themselves with their first attribute."""

    def __init__(self) -> None:
        self._own: dict[str, Loader] = {}  # of parts whose code has not run
        self._there: dict[str, ModuleSpec | None] = {}  # of modules that came with their parent
        self._over = False  # nothing is left for later any more
        self._lock = threading.RLock()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in WANT_ALL:
            self.complete()
        parent = fullname.rpartition(".")[0]
        if parent in self._own:
            self._load(sys.modules[parent])
            if fullname in sys.modules:  # the parent's code has imported it, and it must not run twice
                self._there[fullname] = sys.modules[fullname].__spec__
                sys.modules[fullname].__spec__ = ModuleSpec(fullname, self)
                return sys.modules[fullname].__spec__
        if self._over or fullname not in LATE:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            self._own[fullname] = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return sys.modules.get(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ in self._there:
            module.__spec__ = self._there.pop(module.__name__)
        else:
            vars(module)["__getattr__"] = partial(self._asked, module)

    def complete(self) -> None:
        """Run the code of all parts that were passed over, and pass over none from now on."""
        self._over = True
        for name in list(self._own):
            self._load(sys.modules[name])

    def _asked(self, module: ModuleType, name: str) -> Any:
        if name.startswith("__"):  # what the import system itself looks for
            raise AttributeError(name)
        self._load(module)
        return getattr(module, name)

    def _load(self, module: ModuleType) -> None:
        with self._lock:
            loader = self._own.pop(module.__name__, None)
            if loader is None:
                return
            vars(module).pop("__getattr__")
            module.__loader__ = loader
            if module.__spec__ is not None:
                module.__spec__.loader = loader
            loader.exec_module(module)


PARTS = LateParts()


def leave_for_later() -> None:
    """From now on, unless torch is here already, or of another release."""
    if "torch" in sys.modules or PARTS in sys.meta_path or importlib.util.find_spec("torch") is None:
        return
    if importlib.metadata.version("torch").startswith(RELEASES):
        sys.meta_path.insert(0, PARTS)


def complete() -> None:
    """Before code that quire does not know gets to work: all of torch, as it would expect it."""
    PARTS.complete()
