"""What a file says of a tree beside its pages, and the empty tree that it makes."""

import torch

from . import encoding


def describe(tree) -> dict:
    """Plain JSON: shapes, and what base LM and GistNet the tree needs."""
    keys = {} if tree.keys is None else {"keys": {"size": tree.keys.size, "made_by": encoding.identity(tree.keys)}}
    return (
        keys
        | {
            "block_size": tree.block_size,
            "width": tree.width,
            "dtype": None if tree.dtype is None else str(tree.dtype).removeprefix("torch."),
            "max_level": tree.max_level,
            "lengths": tree.lengths.tolist(),
            "page_sizes": [level.size for level in tree.levels],
            "model": encoding.identity_of_base(tree.base),
            "layers": encoding.identity_of_layers(tree.base, tree.encoder),
            "versions": tree.identities(),
            "version": tree.version,
            "parts": [[name, first.tolist()] for name, first in tree.parts],
            "compacted": tree.compacted,
        }
        | ({"signals": True} if tree.signals else {})
    )


def described(about: dict, encoder, base, refresh: bool, device, keys):
    """The tree of a description, with its levels and their lengths, and no page in it; and what ``encoder`` is.

    Raises:
        ValueError: it is for another base LM, width, block size or (without ``refresh``) GistNet; or it makes no sense.
        KeyError, TypeError, IndexError, AttributeError: it is damaged.
    """
    from .tree import MegaContextTree

    for what in ("block_size", "width"):
        if about[what] != getattr(encoder, what):
            raise ValueError(f"its {what} is {about[what]}, the GistNet's is {getattr(encoder, what)}")
    model = encoding.identity_of_base(base)
    if model is not None and about["model"] is not None and model != about["model"]:
        raise ValueError(f"it belongs to another base LM: embeddings {about['model']}, not {model}")
    layers, there = encoding.identity_of_layers(base, encoder), about.get("layers")
    if None not in (layers, there) and layers != there:  # trees of earlier days do not say
        raise ValueError(f"it belongs to another base LM: layers {there}, not {layers}; its GistNet reads them")
    identity = encoding.identity(encoder)
    made_by = about["versions"][about["version"]]
    if made_by != identity and encoding.known_as(encoder, made_by):
        about["versions"][about["version"]] = made_by = identity
    if made_by != identity and not refresh:
        raise ValueError(f"another GistNet made it: {made_by}, not {identity}. refresh=True encodes it again")
    if about["dtype"] not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f"gists of dtype {about['dtype']!r} are not known")
    dtype = None if about["dtype"] is None else getattr(torch, about["dtype"])
    lengths = tokens(about["lengths"])
    tree = MegaContextTree(encoder, base, len(lengths), about["max_level"], dtype, device, keys=keys)
    tree.parts = [(str(name), tokens(first)) for name, first in about["parts"]]
    tree.versions, tree.version = list(about["versions"]), about["version"]
    if type(compacted := about.get("compacted", 0)) is not int or compacted < 0:
        raise ValueError(f"compacted={compacted!r} is no number of blocks")
    tree.compacted = compacted
    lod, counts = 0, lengths
    while True:
        if lod > tree.depth:
            tree.new_level()
        level, size = tree.levels[lod], about["page_sizes"][lod]
        if type(size) is not int or size < 1:
            raise ValueError(f"page size {size!r} of level {lod} is no size")
        level.size, level.lengths = size, counts.clone()
        lod, counts = lod + 1, counts // tree.block_size
        if not counts.any() or (tree.max_level is not None and lod > tree.max_level):
            if about.get("signals") and tree.depth:
                tree.take_signals()
            return tree, identity


def tokens(numbers: list[int]) -> torch.Tensor:
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise ValueError(f"{str(numbers)[:100]} are no numbers of tokens")
    return torch.tensor(numbers, dtype=torch.long)


def key_size(about: dict) -> int | None:
    """Numbers of a key as the tree was saved; ``None``: it has none."""
    if (keys := about.get("keys")) is None:
        return None
    if type(size := keys["size"]) is not int or not 0 < size < 2**16:
        raise ValueError(f"keys of {size!r} numbers are not known")
    return size
