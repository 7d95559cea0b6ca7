"""Device: where a worker's tensors live, how much memory is there, how data gets in and out.

Knows nothing of models, plans or kernels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from quire.errors import ConfigError
from quire.kernels.memory import CGROUP, MEMINFO, DeviceMemory, cpu_memory
from quire.kernels.threads import usable_cpus


class Device:
    """One device, named "cpu", "cuda" or "cuda:1".

    Work for a GPU is put on one stream that this object owns, so that copies and kernels keep their order; the host
    waits only where it reads a result.
    """

    def __init__(self, name: str = "cpu") -> None:
        self.torch_device = torch.device(name)
        self.kind = self.torch_device.type
        if self.kind not in ("cpu", "cuda"):
            raise ConfigError(f"No support for device {name!r}; quire runs on cpu and cuda.")
        self._stream: torch.cuda.Stream | None = None
        if self.kind == "cuda":
            if not torch.cuda.is_available():
                raise ConfigError(f"Device {name!r} was asked for, but PyTorch {torch.__version__} finds no GPU here.")
            self.torch_device = torch.device("cuda", self.torch_device.index or 0)
            self._stream = torch.cuda.Stream(self.torch_device)

    def memory(self) -> DeviceMemory:
        """The memory as it is now. On a CPU a control group's limit counts, not the machine's label."""
        if self.kind == "cuda":
            free, total = torch.cuda.mem_get_info(self.torch_device)
            return DeviceMemory(total, free)
        return cpu_memory(MEMINFO, CGROUP)

    def threads(self) -> int:
        """Threads that this process may use: its affinity mask, cut by the control group's quota."""
        return usable_cpus(CGROUP)

    def stream(self) -> AbstractContextManager[Any]:
        """While entered, work goes to this device's own stream. On a CPU it changes nothing."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor on the device; on a CPU the tensor itself.

        For a GPU the copy goes through pinned memory and the host does not wait; the caller may drop its tensor.
        """
        if self.kind == "cpu":
            return tensor
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the host, ready to be read."""
        return tensor if self.kind == "cpu" else tensor.cpu()

    def synchronize(self) -> None:
        """Wait for everything that was started. A CPU has nothing to wait for."""
        if self._stream is not None:
            self._stream.synchronize()
