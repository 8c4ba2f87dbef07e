"""Prefills of documents, kept on disk: a frozen base LM reads a document once for all runs, seeds and sweeps.

    $MEGACTX_CACHE/prefills/BASE-PASS-KEPT/DOCUMENT.safetensors      hidden, keys, values
                                          /DOCUMENT.LAYER.safetensors  what goes into one layer, where a net reads it

Every document is read in a pass of its own and rounded to what is kept, the first time too. So a run has the same bits
whether a file was there or not, and a resumed run goes on exactly.

T tokens, D width, L layers, G key-value heads, W head width.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megactx.data.documents import cache_folder
from megactx.framework.files import replacing

from .base import BaseLM
from .identity import of_embeddings, of_weights
from .prefill import Prefill, prefill

log = logging.getLogger(__name__)

VERSION = 1
KEPT = ("float16", "float32")
ELSEWHERE = "set MEGACTX_CACHE to another folder, or stage.prefills.gigabytes=0"


class PrefillCache:
    """Prefills by document.

    Args:
        base: the frozen base LM.
        gigabytes: files take at most so much (1e9 bytes), those of earlier runs with this base counted in; what comes
            later is read again each time.
        dtype: of ``KEPT``: what numbers are rounded to.
        layers: whose inputs ``Prefill.states`` shall hold; the other entries are empty.
        place: folder of all caches of prefills; ``None``: that of ``cache_folder``.

    Raises:
        ValueError: an unknown ``dtype``, or a layer that the base LM has not.
    """

    def __init__(
        self,
        base: BaseLM,
        gigabytes: float,
        dtype: str = "float16",
        layers: Sequence[int] = (),
        place: Path | None = None,
    ):
        if dtype not in KEPT:
            raise ValueError(f"stage.prefills.dtype={dtype} is not known, allowed are {', '.join(KEPT)}")
        self.count = base.config.get_text_config().num_hidden_layers
        if wrong := [layer for layer in layers if not 0 <= layer <= self.count]:
            raise ValueError(f"gistnet.input_layer={wrong[0]} is not allowed: 0 to {self.count}")
        self.base, self.dtype, self.layers = base, getattr(torch, dtype), tuple(sorted(set(layers)))
        which = f"{of_embeddings(base)}{of_weights(base)}-{str(base.model.dtype).removeprefix('torch.')}-{dtype}"
        self.folder = (place or cache_folder() / "prefills") / f"{which}-{VERSION}"
        self.room = int(gigabytes * 1e9) - sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        self.full = False

    def bytes_per_token(self) -> int:
        """Of a document in the cache."""
        config = self.base.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or self.base.width // config.num_attention_heads
        return self.dtype.itemsize * ((1 + len(self.layers)) * self.base.width + 2 * self.count * heads * width)

    def __call__(self, ids: Tensor, lengths: Tensor) -> Prefill:
        """Of documents ids [B, T], padded on the right; what stands in the padding is 0.

        Raises:
            ValueError: a number is too large for fp16.
            RunFailed: the disk is full.
        """
        rows = [self._document(row[:length]) for row, length in zip(ids, lengths.tolist(), strict=True)]
        dtype, (b, t) = self.base.model.dtype, ids.shape

        def together(parts: list[Tensor], axis: int) -> Tensor:  # axis: that of the tokens
            if b == 1 and parts[0].shape[axis] == t:
                return parts[0].to(ids.device, dtype)[None]
            shape = list(parts[0].shape)
            shape[axis] = t
            out = torch.zeros(b, *shape, dtype=dtype, device=ids.device)
            for row, part in zip(out, parts, strict=True):
                row.narrow(axis, 0, part.shape[axis]).copy_(part)
            return out

        cache = tuple(
            tuple(together([row[name][layer] for row in rows], 1) for name in ("keys", "values"))
            for layer in range(self.count)
        )
        empty = ids.new_empty(0, dtype=dtype)
        states = tuple(
            together([row[f"state{layer}"] for row in rows], 0) if layer in self.layers else empty
            for layer in range(self.count + 1)
        )
        return Prefill(ids, together([row["hidden"] for row in rows], 0), cache, states if self.layers else ())

    def has(self, ids: Tensor) -> bool:
        """Whether all of a document ids [T], int64, is there."""
        return all(file.exists() for file in self._files(ids))

    @staticmethod
    def name(ids: Tensor) -> str:
        """Of a document ids [T], int64."""
        return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:32]

    def _files(self, ids: Tensor) -> dict[Path, tuple[str, ...]]:
        name = self.name(ids)
        files = {self.folder / f"{name}.safetensors": ("hidden", "keys", "values")}
        return files | {self.folder / f"{name}.{layer}.safetensors": (f"state{layer}",) for layer in self.layers}

    def _document(self, ids: Tensor) -> dict[str, Tensor]:
        """hidden [T, D], keys and values [L, G, T, W], and state<l> [T, D] of what is asked for."""
        found: dict[str, Tensor] = {}
        files = self._files(ids)
        for file, names in files.items():
            found |= _read(file, names)
        if len(found) == sum(map(len, files.values())):
            return found
        found = self._made(ids)
        for file, names in files.items():
            self._keep(file, {name: found[name] for name in names})
        return found

    def _made(self, ids: Tensor) -> dict[str, Tensor]:
        read = prefill(self.base, ids[None], bool(self.layers))
        found = {"hidden": read.hidden[0]} | {f"state{layer}": read.states[layer][0] for layer in self.layers}
        for index, name in enumerate(("keys", "values")):
            found[name] = torch.cat([layer[index] for layer in read.cache])
        found = {name: tensor.to(self.dtype) for name, tensor in found.items()}
        for name, tensor in found.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"stage.prefills.dtype=float16 is not allowed with this base LM: its {name} are too large for 16"
                    " bits; set it to float32"
                )
        return found

    def _keep(self, file: Path, tensors: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if file.exists() or self.full:
            return
        if size > self.room:
            self.full = True
            log.info("The cache of prefills is full (stage.prefills.gigabytes): other documents are read each time")
            return
        with replacing(file, ELSEWHERE) as part:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
        self.room -= size


def _read(file: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a file, memory-mapped; nothing where it is not there or damaged."""
    try:
        with safe_open(file, "pt") as found:
            return {name: found.get_tensor(name) for name in names}
    except (OSError, SafetensorError):
        file.unlink(missing_ok=True)
        return {}
