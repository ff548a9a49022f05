"""Several processes that train one model: torchrun, `accelerate launch`, or whatever sets their variables.

Every process holds the whole model and takes its own rows; gradients are averaged, and the first process writes.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from runner.errors import RunnerError

Losses = Callable[..., Mapping[str, torch.Tensor]]


class LostProcess(RunnerError):
    """Another process of this training has ended before its time."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among `size`; without others the rank is 0."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes, logs and speaks."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """The GPU of this process where each has one; None: as the user says."""
        if self.size > 1 and torch.cuda.is_available():
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return None

    def averaged(self, parameters: Sequence[nn.Parameter], losses: Losses) -> "Averaged":
        """`losses` so that the gradients of `parameters` are those of all processes' batches together."""
        return Averaged(parameters, losses, self.size > 1)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        found = torch.tensor([float(flag)], device=self.device or "cpu")
        with lost_process():
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return bool(found.item())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of `values` over the processes."""
        if self.size > 1:
            with lost_process():
                distributed.all_reduce(values)
            values /= self.size
        return values

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            with lost_process():
                distributed.barrier()


ALONE = World()


class Averaged:
    """Losses whose gradients DistributedDataParallel averages over the processes in `backward`, if there are several.

    It sees the trained parameters alone: the base is the same in every process and gets no gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], losses: Losses, several: bool) -> None:
        self._losses = losses
        self._parallel: DistributedDataParallel | None = None
        if several:
            with lost_process():
                self._parallel = DistributedDataParallel(_Trained(parameters, losses))

    def __call__(self, *arguments: object) -> Mapping[str, torch.Tensor]:
        """The losses."""
        if self._parallel is None:
            return self._losses(*arguments)
        found: Mapping[str, torch.Tensor] = self._parallel(*arguments)
        return found

    def synchronised(self, last: bool) -> AbstractContextManager[object]:
        """Within the block gradients add up, and are averaged only for the `last` micro-batch of a step."""
        if self._parallel is None:
            return nullcontext()
        return lost_process() if last else self._parallel.no_sync()


class _Trained(nn.Module):
    def __init__(self, parameters: Sequence[nn.Parameter], losses: Losses) -> None:
        super().__init__()
        self.parameters_ = nn.ParameterList(parameters)
        self._losses = losses

    def forward(self, *arguments: object) -> Mapping[str, torch.Tensor]:
        return self._losses(*arguments)


@contextmanager
def joined() -> Iterator[World]:
    """This process among those that a launcher started, as RANK and WORLD_SIZE say; alone without them."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with lost_process():
        distributed.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield World(rank=distributed.get_rank(), size=size)
    finally:
        distributed.destroy_process_group()


@contextmanager
def lost_process() -> Iterator[None]:
    """Within the block what torch raises when another process is gone is a LostProcess."""
    try:
        yield
    except distributed.DistError as error:
        raise LostProcess("another process of this training has ended") from error
    except RuntimeError as error:
        # gloo has no type of its own for it
        if not any(word in str(error) for word in ("gloo", "Connection closed by peer", "NCCL")):
            raise
        raise LostProcess("another process of this training has ended") from error
