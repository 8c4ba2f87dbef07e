"""Compressors by name: what a config calls ``gistnet``, ``gisting``, ``gistpool``."""

import functools
import inspect

from megactx.gist import carriers
from megactx.gist.gistnet import GistNet
from megactx.gist.parts import find
from megactx.lm import BaseLM

from .carrier import Compressor


def build(base: BaseLM, settings: dict, setting: str = "compressor") -> Compressor:
    """A compressor that can be trained.

    Args:
        base: the base LM that reads what it makes.
        settings: ``name``, ``gistnet`` where it is missing, or a file of ``megactx/gist/carriers``; and its arguments.
        setting: what the user has set, for messages.

    Raises:
        ValueError: an unknown name, an argument that it does not take, or nothing in it that can be trained.
    """
    settings = dict(settings)
    name = settings.pop("name", "gistnet")
    if name == "gistnet":
        kind, given = functools.partial(GistNet, base=base), (base.width, base.embedding_rms())
    else:
        kind, given = find(carriers, name, f"{setting}.name"), (base,)
        if "base" not in inspect.signature(kind).parameters:
            raise ValueError(f"{setting}.name={name} is not allowed: there is nothing in it to train")
    allowed = [name for name in list(inspect.signature(kind).parameters)[len(given) :] if name != "base"]
    if unknown := set(settings) - set(allowed):
        known = ", ".join(allowed)
        raise ValueError(f"{setting}.{sorted(unknown)[0]}: {name} has no such setting, it has {known}")
    return kind(*given, **settings)
