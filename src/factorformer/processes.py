"""One job in several processes, as `torchrun` starts them, on torch's own process group.

Batches of calibration are divided, and what is measured of them is added up; matrices are divided by what they cost,
and what is found of one is told to all. The first process prints and writes. Anywhere else but in `joined` there is
one process, and nothing here does anything.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from factorformer.errors import FactorformerError, one_line

if TYPE_CHECKING:
    from torch import Tensor

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What `torchrun` tells each process."""

PATIENCE = datetime.timedelta(days=7)
"""How long one process waits for another, which may be fitting a large matrix."""

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_joined: list[tuple[int, int]] = []
"""The place of this process among how many, while they work together."""


def started() -> int:
    """How many processes were started for one job."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return started() == 1 or os.environ["RANK"] == "0"


def count() -> int:
    """How many processes work together."""
    return _joined[-1][1] if _joined else 1


def place() -> int:
    """The number of this one, from 0 on."""
    return _joined[-1][0] if _joined else 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """While this lasts, all processes that were started for this job divide it among them."""
    if started() == 1 or _joined:
        yield
        return
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        here, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if here >= there:
            raise FactorformerError(f"{there} GPUs, and more processes than these on one machine: start one for each")
        torch.cuda.set_device(here)
    # Tensors on either are exchanged; torchrun ends those that wait for one that has failed.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    _joined.append((dist.get_rank(), dist.get_world_size()))
    try:
        yield
        agree(holds=True)  # the first may have something to measure still
    finally:
        _joined.pop()
    dist.destroy_process_group()  # after an error, others may never come to that


@contextlib.contextmanager
def _others() -> Iterator[None]:
    """An exchange with the others, of which none may be missing."""
    try:
        yield
    except RuntimeError as error:  # of the backends, which have no type of their own
        what = "another process of this job has ended, or cannot be reached"
        raise FactorformerError(f"{what}: {one_line(error)}") from error


def own(items: Sequence[Item], cost: Callable[[Item], float] = lambda item: 1.0) -> list[Item]:
    """The part of some items that this process does, in their order: each goes to the one with least to do so far."""
    if count() == 1:
        return list(items)
    loads, mine = [0.0] * count(), []
    costs = [cost(item) for item in items]
    for number in sorted(range(len(items)), key=lambda number: -costs[number]):
        least = loads.index(min(loads))
        loads[least] += costs[number]
        if least == place():
            mine.append(number)
    return [items[number] for number in sorted(mine)]


def gathered(found: Value) -> list[Value]:
    """What each process has found, in their order; tensors on a GPU come to that of this process."""
    if count() == 1:
        return [found]
    import torch
    import torch.distributed as dist

    def here(storage: Any, location: str) -> Any:
        return storage.cuda(torch.cuda.current_device()) if location.startswith("cuda") else storage

    with io.BytesIO() as written:
        torch.save(found, written)
        everything: list[Any] = [None] * count()
        with _others():
            dist.all_gather_object(everything, written.getvalue())
    # These are our own processes, which have run nothing but this.
    return [torch.load(io.BytesIO(part), map_location=here, weights_only=False) for part in everything]


def merged(found: Mapping[Key, Value]) -> dict[Key, Value]:
    """What all processes have found, by name; of what several have, that of the first."""
    return {key: value for part in reversed(gathered(dict(found))) for key, value in part.items()}


def add(tensor: Tensor) -> None:
    """Add up a tensor over all processes, in place."""
    if count() > 1:
        import torch.distributed as dist

        with _others():
            dist.all_reduce(tensor)


def total(number: float) -> float:
    """The sum of a number over all processes."""
    return sum(gathered(number))


def agree(holds: bool) -> bool:
    """Whether something holds in all processes."""
    return all(gathered(holds))
