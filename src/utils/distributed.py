"""Data-parallel processes: the share of each in the work, and the communication between them.

torchrun starts the processes. Without torchrun there is one process, which does everything.
"""

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from src.utils.devices import collective_backends, make_current
from src.utils.errors import UserError, first_line
from src.utils.torchrun import VARIABLES, place

# One process may compute for hours while the others wait, for example Inception features of the test images.
COLLECTIVE_TIMEOUT = timedelta(hours=6)
CONNECTION_TIMEOUT = timedelta(minutes=5)  # for the slowest process to start
T = TypeVar("T")


class World:
    """The group of processes, in which this one has the number `rank` of `size`.

    A context: the processes connect when they enter it and disconnect when they leave it. All methods that communicate
    must be called by every process, in the same order. They take tensors on `device` or on the CPU.

    Args:
        device: the device of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, _ = place()
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the log. Exactly one does."""
        return self.rank == 0

    def __enter__(self) -> "World":
        if self.size > 1:
            make_current(self.device)
            self._connect()
            logging.disable(logging.NOTSET if self.is_main else logging.WARNING)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.size > 1 and error is None:  # after an error, other processes may never respond
            dist.destroy_process_group()

    def _connect(self) -> None:
        """Find the other processes."""
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=CONNECTION_TIMEOUT))
            backends, rank, size = collective_backends(self.device), self.rank, self.size
            dist.init_process_group(backends, store=store, timeout=COLLECTIVE_TIMEOUT, rank=rank, world_size=size)
            store.set_timeout(COLLECTIVE_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"process {self.rank} of {self.size} cannot reach the others ({first_line(error)}): start all of them "
                f"with torchrun, or for a single process unset {' '.join(VARIABLES)}"
            ) from error

    def share(self, count: int) -> slice:
        """This process's part of `count` items; the parts differ by at most one item in size."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def equal_share(self, indices: Sequence[int]) -> list[int]:
        """This process's part of `indices`, whose last element is repeated until all parts have the same length."""
        part = -(-len(indices) // self.size)
        return [indices[min(i, len(indices) - 1)] for i in range(self.rank * part, (self.rank + 1) * part)]

    def wrap(self, network: nn.Module) -> nn.Module:
        """Wrap a network so that its gradients are averaged over all processes; one process gets it unwrapped."""
        return DistributedDataParallel(network) if self.size > 1 else network

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """Context in which a wrapped network's gradients accumulate without being averaged over the processes."""
        return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes, which all get."""
        if self.size == 1:
            return value
        dist.all_reduce(value := value / self.size)
        return value

    def maximum(self, number: int) -> int:
        """The largest of the numbers that the processes pass, which all get."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)  # on the CPU, to avoid waiting for the device
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def agree(self, value: object, what: str) -> None:
        """Check that all processes have the same value, since machines may have different files on their disks.

        Args:
            value: is compared by its repr.
            what: describes the value in the message.

        Raises:
            UserError: the values differ; raised in every process.
        """
        number = zlib.crc32(repr(value).encode())
        if self.maximum(number) != -self.maximum(-number):
            raise UserError(f"the processes differ in {what}: all machines must have the same files")

    def main_first(self, make: Callable[[], T]) -> T:
        """Call `make` in the main process and then in the others, which find the files that it wrote."""
        if self.is_main:
            made = make()
            self.wait()
            return made
        self.wait()
        return make()

    def wait(self) -> None:
        """Wait until all processes have called this method."""
        self.maximum(0)

    def gather(self, part: Tensor) -> Tensor:
        """Concatenate the parts (n, ...) of all processes to (size * n, ...), on the device of `part`."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def divide(self, make: Callable[[Sequence[int]], Tensor], count: int, batch_size: int) -> Iterator[Tensor]:
        """Compute something for the indices 0 to count - 1, in batches that are divided among the processes.

        Args:
            make: indices (n) → results (n, ...), one for each index. Called with this process's share of a batch;
                a last batch that cannot be divided evenly is filled up by repeating its last index.
            count: of the indices.
            batch_size: indices per batch, over all processes.

        Yields:
            The results of each batch, (batch_size, ...) and fewer in the last one, in every process.
        """
        for first in range(0, count, batch_size):
            indices = range(first, min(first + batch_size, count))
            yield self.gather(make(self.equal_share(indices)))[: len(indices)]
