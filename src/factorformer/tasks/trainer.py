"""What every use of the Hugging Face `Trainer` needs around it: seeds, `forward` and precision as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from transformers import set_seed


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch for a while; afterwards they are as they were.

    >>> before = torch.get_rng_state()
    >>> with seeded(3):
    ...     first = torch.rand(1)
    >>> with seeded(3):
    ...     assert torch.equal(torch.rand(1), first)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


@contextlib.contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Take off what Accelerate wraps around `forward` for the precision of a training, which ends with it."""
    wrapped = ("forward", "_original_forward")
    own = {name: vars(model)[name] for name in wrapped if name in vars(model)}
    try:
        yield
    finally:
        for name in wrapped:
            vars(model).pop(name, None)
        vars(model).update(own)


def in_full_precision(model: nn.Module) -> Callable[[], None]:
    """Turn values that are stored in 16 bits into float32, in place, to train on.

    Args:
        model: its layers may be factorized before what is returned is called.

    Returns:
        What turns the values of each layer back into the type that the layer had.
    """
    types: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        for key, tensor in _values(module):
            types.setdefault(name, tensor.dtype)
            types[f"{name}.{key}"] = tensor.dtype
    for module in model.modules():
        for _, tensor in _values(module):
            if tensor.dtype.itemsize < 4:
                tensor.data = tensor.data.float()

    def restore() -> None:
        for name, module in model.named_modules():
            for key, tensor in _values(module):
                dtype = types.get(f"{name}.{key}", types.get(name, tensor.dtype))
                if tensor.dtype != dtype:
                    tensor.grad = None
                    tensor.data = tensor.data.to(dtype)

    return restore


def _values(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Floating tensors of a module itself."""
    for named in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        yield from ((name, tensor) for name, tensor in named if tensor.is_floating_point())
