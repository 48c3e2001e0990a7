"""A growing tensor, for what is collected from many batches."""

import torch
from torch import Tensor


class Rows:
    """Collects batches of rows (B, ...) in one tensor on the CPU, whose capacity doubles whenever it is full.

    A list of batches would fragment the heap: each kept batch lies between activations of the network that are freed
    around it, and the gaps may be too small for the next batch. A process could grow by gigabytes that way.
    """

    def __init__(self) -> None:
        self._memory, self._count = torch.empty(0), 0

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Tensor) -> None:
        """Copy a batch from any device to the end; every batch gets the dtype of the first."""
        count = self._count + len(rows)
        if not self._count or count > len(self._memory):
            memory = torch.empty(max(count, 2 * len(self._memory)), *rows.shape[1:], dtype=rows.dtype)
            if self._count:
                memory[: self._count] = self.all()
            self._memory = memory
        self._memory[self._count : count] = rows
        self._count = count

    def all(self) -> Tensor:
        """All rows so far, (N, ...): a view, not a copy."""
        return self._memory[: self._count]
