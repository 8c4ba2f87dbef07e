"""What the substitution engine measured: NLL per block and per offset for every carrier.

The one container that metrics, bootstrap, report and plots read. M blocks, H horizon offsets; NLL in nats.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megactx.framework.files import replacing, write

from .table import OVERALL

MORE_RAW = "as many more raw tokens"  # of a history: one raw token in place of each carrier
DROP = "drop"  # the name under which ``kl`` and ``agree`` may also hold the dropped block


@dataclass
class BlockScores:
    """Scores of the same blocks under the full context, without the block, and with each carrier in its place (CPU).

    Args:
        full: NLL_full, [M, H] nats.
        drop: NLL_drop, [M, H] nats.
        carriers: name -> NLL with that carrier in place of the block, [M, H] nats.
        kl: name -> KL(P_full || P_carrier), [M, H] nats; the names are carriers or ``"drop"``.
        agree: name -> same argmax as under the full context, bool [M, H].
        domain: domain of each block's document, M strings.
        document: source text of each block, int64 [M]: the unit that the bootstrap resamples.
        start: first token of each block in its document, int64 [M].

    Raises:
        ValueError: a wrong shape or dtype, an unknown carrier name, or a value that is NaN or infinite, by name.
    """

    full: Tensor
    drop: Tensor
    carriers: dict[str, Tensor]
    kl: dict[str, Tensor] = field(default_factory=dict)
    agree: dict[str, Tensor] = field(default_factory=dict)
    domain: list[str] = field(default_factory=list)
    document: Tensor = None
    start: Tensor = None

    def __post_init__(self):
        if self.full.ndim != 2 or not self.full.numel():
            raise ValueError(f"scores: full has shape {list(self.full.shape)}, wanted [blocks, horizon], both above 0")
        blocks = len(self.full)
        for name, values in self._per_offset().items():
            if values.shape != self.full.shape:
                raise ValueError(f"scores: {name} has shape {list(values.shape)}, wanted {list(self.full.shape)}")
            if name.startswith("agree/") != (values.dtype == torch.bool):
                raise ValueError(f"scores: {name} has dtype {values.dtype}, wanted float (bool for agree)")
            if bad := int((~torch.isfinite(values)).sum()):
                raise ValueError(f"scores: {name} holds {bad} values that are NaN or infinite")
        for name in {*self.kl, *self.agree} - {*self.carriers, DROP}:
            raise ValueError(f"scores: {name!r} has KL or agreement but is none of the carriers {list(self.carriers)}")
        for name, values in (("document", self.document), ("start", self.start)):
            if values is None or values.shape != (blocks,) or values.dtype != torch.int64:
                raise ValueError(f"scores: {name} must be int64 [{blocks}]")
        if len(self.domain) != blocks:
            raise ValueError(f"scores: {len(self.domain)} domains for {blocks} blocks")

    def __len__(self) -> int:
        return len(self.full)

    @property
    def horizon(self) -> int:
        """H, the number of scored predictions after each block."""
        return self.full.shape[1]

    @property
    def documents(self) -> int:
        """Source texts that the blocks are of."""
        return self.document.unique().numel()

    def cost(self, first: int = 0) -> float:
        """What having nothing in place costs over offsets h >= first, mean over blocks, nats per token."""
        return (self.drop.double() - self.full.double())[:, first:].mean().item()

    @property
    def domains(self) -> list[str]:
        """The domains present, in order of first appearance."""
        return list(dict.fromkeys(self.domain))

    def rows(self, domain: str) -> list[int]:
        """The blocks of one domain."""
        return [index for index, name in enumerate(self.domain) if name == domain]

    def by_domain(self) -> dict[str, "BlockScores"]:
        """``overall`` and every domain -> its blocks."""
        return {OVERALL: self} | {domain: self.take(self.rows(domain)) for domain in self.domains}

    def take(self, blocks: list[int] | slice, offsets: slice = slice(None)) -> "BlockScores":
        """Some of the blocks, in this order, over some of the offsets."""
        tables = {name: values[blocks][:, offsets] for name, values in self._per_offset().items()}
        order = range(len(self))[blocks] if isinstance(blocks, slice) else blocks
        own = {"document": self.document[blocks], "start": self.start[blocks]}
        return BlockScores(**_nested(tables), domain=[self.domain[index] for index in order], **own)

    def block_hash(self) -> str:
        """12 hex digits that identify the scored blocks whatever their order: equal hashes, same blocks."""
        keys = sorted(zip(self.document.tolist(), self.start.tolist(), strict=True))
        return hashlib.sha256(json.dumps([self.horizon, keys]).encode()).hexdigest()[:12]

    @staticmethod
    def concatenate(parts: list["BlockScores"]) -> "BlockScores":
        """Batches of the same carriers and horizon -> one.

        Raises:
            ValueError: no parts, or parts with other carriers.
        """
        if not parts:
            raise ValueError("scores: no blocks were scored")
        tables = [part._per_offset() for part in parts]
        if odd := {name for own in tables for name in own.keys() ^ tables[0].keys()}:
            raise ValueError(f"scores: parts differ in {sorted(odd)}")
        merged = {name: torch.cat([own[name] for own in tables]) for name in tables[0]}
        return BlockScores(
            **_nested(merged),
            domain=[name for part in parts for name in part.domain],
            document=torch.cat([part.document for part in parts]),
            start=torch.cat([part.start for part in parts]),
        )

    def save(self, path: str | Path) -> None:
        """Write ``path`` (``.safetensors``) and the same name with ``.json``."""
        from safetensors.torch import save_file

        path = _safetensors(path)
        tensors = self._per_offset() | {"document": self.document, "start": self.start}
        with replacing(path) as part:
            save_file({name: values.detach().cpu().contiguous() for name, values in tensors.items()}, part)
        about = {"domain": self.domain, "horizon": self.horizon, "block_hash": self.block_hash()}
        write(path.with_suffix(".json"), json.dumps(about))

    @staticmethod
    def load(path: str | Path) -> "BlockScores":
        """Read what ``save`` wrote.

        Raises:
            ValueError: a file is missing or damaged, or the two are not of one save.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = _safetensors(path)
        try:
            tensors, about = load_file(path), json.loads(path.with_suffix(".json").read_text())
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"scores: {path} cannot be read ({error})") from error
        document, start = tensors.pop("document"), tensors.pop("start")
        scores = BlockScores(**_nested(tensors), domain=about["domain"], document=document, start=start)
        if scores.block_hash() != about["block_hash"]:
            raise ValueError(f"scores: {path} and its .json hold different blocks")
        return scores

    def _per_offset(self) -> dict[str, Tensor]:
        """Every [M, H] tensor under a flat name."""
        groups = {"carriers": self.carriers, "kl": self.kl, "agree": self.agree}
        flat = {f"{group}/{name}": values for group, named in groups.items() for name, values in named.items()}
        return {"full": self.full, "drop": self.drop} | flat


def _nested(flat: dict[str, Tensor]) -> dict:
    out = {"carriers": {}, "kl": {}, "agree": {}}
    for name, values in flat.items():
        group, _, member = name.partition("/")
        if member:
            out[group][member] = values
        else:
            out[group] = values
    return out


def _safetensors(path: str | Path) -> Path:
    return Path(path).with_suffix(".safetensors")
