"""Several processes, one training: who this process is, its share of the work, and what all of them have to agree on.

torchrun starts them and names them in the environment; torch.distributed carries what they say. Without torchrun
there is one process, whose share is everything. Nothing else in this repository knows how many there are.
"""

import logging
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from src.devices import collective_backends, make_current  # which library carries a device's tensors
from src.errors import UserError  # files that differ between machines are something the user can mend

PATIENCE = timedelta(hours=6)  # with a process that computes what the others wait for, as features of test images
T = TypeVar("T")


class World:
    """This process among all: number `rank` of `size`.

    As a context, it connects the processes on entering and parts them on leaving.

    Args:
        device: this process's own. Tensors are exchanged from there or from the CPU, wherever they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and speaks to the user."""
        return self.rank == 0

    def __enter__(self) -> "World":
        if self.size > 1:
            make_current(self.device)
            dist.init_process_group(collective_backends(self.device), timeout=PATIENCE)
            logging.disable(logging.NOTSET if self.is_main else logging.WARNING)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.size > 1 and error is None:  # after an error the others may never answer
            dist.destroy_process_group()

    def share(self, count: int) -> slice:
        """This process's part of `count` things; of a multiple of `size`, all have as many."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def equal_share(self, indices: Sequence[int]) -> list[int]:
        """This process's part of any number of indices, of which the last is repeated until all have as many."""
        part = -(-len(indices) // self.size)
        return [indices[min(i, len(indices) - 1)] for i in range(self.rank * part, (self.rank + 1) * part)]

    def wrap(self, network: nn.Module) -> nn.Module:
        """The same network; if there are others, its gradients will be the mean over all processes."""
        return DistributedDataParallel(network) if self.size > 1 else network

    def alone(self, network: nn.Module) -> AbstractContextManager[None]:
        """A context in which a wrapped network's gradients are summed up by themselves, for the next one to send."""
        return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.size == 1:
            return value
        dist.all_reduce(value := value / self.size)
        return value

    def maximum(self, number: int) -> int:
        """The largest of all processes' numbers: if one was told to stop, all are."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)  # on the CPU: no waiting for the device
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def agree(self, value: object, what: str) -> None:
        """Raise UserError, in every process, unless all have the same value; `what` says in words what it stands for.

        Several machines have several disks, and gradients of different weights or images would be averaged unseen.
        """
        number = zlib.crc32(repr(value).encode())
        if self.maximum(number) != -self.maximum(-number):
            raise UserError(f"the processes differ in {what}: all machines must have the same files")

    def main_first(self, make: Callable[[], T]) -> T:
        """What `make` returns, called by the main process and then by the others, who find what it left on disk."""
        if self.is_main:
            made = make()
            self.wait()
            return made
        self.wait()
        return make()

    def wait(self) -> None:
        """Until all processes are here."""
        self.maximum(0)

    def gather(self, part: Tensor) -> Tensor:
        """The parts (n, ...) of all processes, one after the other: (size · n, ...), where `part` was."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)
