"""Working contexts with the measured values of their edits, on disk: what LensNet learns from.

A file holds one window: its entries, the ids of its tokens, the vectors of its gists, and a value per measured edit. It
does not hold hidden states, so a window of a 3B base takes kilobytes. A run that was killed goes on with the files that
are there.

B windows, W entries, G gists, E edits, D width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megactx.framework.files import IN_RUN, replacing
from megactx.lm import BaseLM
from megactx.memory import WorkingContext

from .edits import Edits, Moves, column_of
from .mean_embeddings import node_mean_embeddings


@dataclass(frozen=True)
class LensBatch:
    """A batch of windows, padded on the right."""

    embeddings: Tensor  # [B, W, D]
    lods: Tensor  # [B, W]
    distance: Tensor  # [B, W], tokens to the end
    mask: Tensor  # [B, W] bool
    mean_embeddings: Tensor  # [B, W, D], see ``window_mean_embeddings``
    legal: Moves
    row: Tensor  # [E], of each measured edit
    column: Tensor  # [E], of the gist, or of the first of the siblings
    expand: Tensor  # [E] bool
    labels: Tensor  # [E] nats, the measured values

    def estimates(self, values: Tensor, block_size: int) -> Tensor:
        """values [B, W, 2] of LensNet -> its value of each measured edit, [E]; of siblings it is their mean."""
        siblings = self.column[:, None] + torch.arange(block_size, device=self.column.device)
        keep = values[self.row[:, None], siblings.clamp(max=values.shape[1] - 1), 1].mean(1)
        return torch.where(self.expand, values[self.row, self.column, 0], keep)


def save(path: Path, context: WorkingContext, row: int, legal: Moves, edits: Edits, values: Tensor) -> None:
    """Write one row of a batch of windows, whole or not at all.

    Args:
        legal: what may be done in these windows.
        edits: the measured edits of all rows; the file gets those of this row.
        values: [E] nats.
    """
    length, tree = int(context.counts[row]), context.tree
    lod, index = context.lod[row, :length], context.index[row, :length]
    rows = torch.full_like(lod, row)
    gist = lod > 0
    raw = tree.tokens[row, index[~gist]].long()
    ids = torch.full_like(lod, -1).masked_scatter(~gist, raw)
    own = edits[edits.row == row]
    first = torch.where(own.expand, own.index, own.index * tree.block_size)
    tensors = {
        "lod": lod.to(torch.int16),
        "ids": ids.int(),
        "gists": tree.embeddings(rows[gist], lod[gist], index[gist]).to(torch.bfloat16),
        "contents": node_mean_embeddings(tree, rows[gist], lod[gist], index[gist]).to(torch.bfloat16),
        "distance": (context.ends()[row] - context.positions()[row, :length]).int(),
        "first": legal.first[row, :length].int(),
        "column": column_of(context, own.row, own.lod - (~own.expand).long(), first).int(),
        "expand": own.expand,
        "values": values[edits.row == row].float(),
    }
    with replacing(path, IN_RUN) as part:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)


def load(paths: list[Path], base: BaseLM) -> LensBatch:
    """Read windows into a batch, on the device of the base LM."""
    device = base.model.device
    files = [{name: tensor.to(device) for name, tensor in load_file(path).items()} for path in paths]
    lengths = torch.tensor([len(file["lod"]) for file in files], device=device)
    w = int(lengths.max())

    def padded(name: str, value: int) -> Tensor:
        rows = [torch.nn.functional.pad(file[name].long(), (0, w - len(file[name])), value=value) for file in files]
        return torch.stack(rows)

    mask = torch.arange(w, device=device) < lengths[:, None]
    lods, ids = padded("lod", 0), padded("ids", 0)
    with torch.no_grad():
        embeddings = base.embed(ids.clamp(min=0)).clone()
    mean_embeddings = embeddings.float().clone()
    embeddings[lods > 0] = torch.cat([file["gists"] for file in files]).to(embeddings.dtype)
    mean_embeddings[lods > 0] = torch.cat([file["contents"] for file in files]).float()
    counts = torch.tensor([len(file["values"]) for file in files], device=device)
    return LensBatch(
        embeddings=embeddings,
        lods=lods,
        distance=padded("distance", 0),
        mask=mask,
        mean_embeddings=mean_embeddings,
        legal=Moves(mask & (lods > 0), padded("first", -1)),
        row=torch.repeat_interleave(counts),
        column=torch.cat([file["column"] for file in files]).long(),
        expand=torch.cat([file["expand"] for file in files]),
        labels=torch.cat([file["values"] for file in files]),
    )
