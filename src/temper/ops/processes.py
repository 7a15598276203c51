"""The processes of one training run: who computes which micro-batch, and sums over all of them.

Started by Accelerate. Losses are sums over counts of the whole step, so adding the processes' gradients gives the
gradient of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from temper.core.errors import ConfigError
from temper.core.types import Run

__all__ = ["Processes", "processes"]


@dataclass(frozen=True)
class Processes:
    """One process's place among `num`; with one process every method does nothing."""

    rank: int = 0
    num: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def owns(self, index: int) -> bool:
        """Whether the step's micro-batch `index` is computed here."""
        return index % self.num == self.rank

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor summed over processes, in place."""
        if self.num > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up gradients; a parameter without one in every process keeps none."""
        if self.num == 1:
            return
        has = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        used = self.sum_(has).bool().tolist()
        handles = []
        for parameter, is_used in zip(parameters, used, strict=True):
            if is_used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                handles.append(dist.all_reduce(parameter.grad, async_op=True))
        for handle in handles:
            handle.wait()

    def share(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the first one's values."""
        if self.num > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, src=0)

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.num > 1:
            dist.barrier()


def processes(run: Run) -> Processes:
    """The present process and its siblings, set up by Accelerate; raises ConfigError when they are not `run.num_procs`."""
    if run.num_procs <= 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=torch.device(run.device).type == "cpu")
    if state.num_processes != run.num_procs:
        raise ConfigError(
            f"The run wants {run.num_procs} processes and there are {state.num_processes}",
            cure=f"Start it with --nproc {run.num_procs} or under `accelerate launch`.",
        )
    return Processes(state.process_index, state.num_processes)
