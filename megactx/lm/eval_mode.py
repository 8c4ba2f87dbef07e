"""Modules that measure while they train."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_eval_mode(*modules: torch.nn.Module) -> Iterator[None]:
    """Without dropout inside, as they were afterwards."""
    training = [module for module in modules if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()
