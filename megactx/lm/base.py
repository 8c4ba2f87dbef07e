"""The base LM: one thin class over any Hugging Face causal LM.

It is a function of embeddings, positions, a 4-D mask and a cache. It calls the model's own backbone and head, and
copies nothing of a modelling file. It refuses a model whose logits are not those of its head on its backbone's states.

Shapes: B batch, Q query rows, S visible columns (cache + Q), D width, V vocabulary.
"""

import copy
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from megactx.data.gguf_base import loadable

from . import each_cache, masks, packed_attention, plain_causal, suffix_attention
from .each_cache import EachCache
from .gaussian_rope import spread
from .kv_hooks import layers_of
from .masks import BEHIND, CAUSAL
from .packed_attention import Branches
from .plain_causal import PlainCausal
from .suffix_attention import Run, Suffix, narrowed

DTYPES = ("float32", "bfloat16", "float16")


class BaseLM(nn.Module):
    """A causal LM that reads embeddings. Frozen on request: eval mode, no grad.

    Args:
        model: a Hugging Face ``...ForCausalLM`` with SDPA attention.
        tokenizer: its tokenizer, or ``None``.

    Raises:
        ValueError: the tokenizer has more ids than the model has rows. Or the model keeps sliding-window caches;
            rotates a position by an angle that depends on the length of the pass; takes no ``inputs_embeds``; does not
            attend through transformers' attention interface; or has other logits than its head gives for its hidden
            states.
    """

    def __init__(self, model: nn.Module, tokenizer=None):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        if tokenizer is not None and len(tokenizer) > self.vocab_size:
            raise ValueError(
                f"base.name: the tokenizer has {len(tokenizer)} ids, but the model only {self.vocab_size} embedding "
                "rows; they do not belong together"
            )
        self._refuse_unsupported()

    @classmethod
    def from_pretrained(cls, name: str, dtype: str | None = None, setting: str = "base.name") -> "BaseLM":
        """Load a Hugging Face name, a local folder or a GGUF file, with its tokenizer.

        Args:
            name: ``owner/model``, a folder, ``FILE.gguf``, or ``asset:NAME``.
            dtype: of ``DTYPES``; ``None`` takes the one that the weights are stored in.
            setting: that gives the name, for what errors say.

        Raises:
            ValueError: nothing can be loaded from there, or the weights are not those of the config.
            RunFailed: a GGUF file was to be converted, and the disk of the cache is full.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        from megactx.data.tokenizer import load_tokenizer

        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"base.dtype={dtype} is not known, allowed are {', '.join(DTYPES)}, or null: as stored")
        folder = loadable(name, setting)
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype) if dtype else "auto",
                attn_implementation="sdpa",
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, where a tensor that is missing is refused too
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(f"{setting}={name}: no causal LM could be loaded from there ({error})") from error
        # transformers would go on with random weights in their place, and with a warning only.
        if wrong := sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"]):
            raise ValueError(
                f"{setting}={name}: the weights do not fit config.json, {len(wrong)} tensors are missing or have"
                f" another shape; the first is {wrong[0]}"
            )
        return cls(model, load_tokenizer(folder))

    @classmethod
    def from_config(cls, config: dict, tokenizer=None) -> "BaseLM":
        """Random weights from a Hugging Face config given as a dict with its ``model_type``.

        Raises:
            ValueError: an unknown ``model_type``, or a head count that does not divide what it splits.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        config = dict(config)
        kind = config.pop("model_type", None)
        heads, width = config.get("num_attention_heads"), config.get("hidden_size")
        if heads and width and width % heads:
            raise ValueError(f"base.config: num_attention_heads={heads} does not divide hidden_size={width}")
        shared = config.get("num_key_value_heads")
        if heads and shared and heads % shared:
            raise ValueError(f"base.config: num_key_value_heads={shared} does not divide num_attention_heads={heads}")
        try:
            settings = AutoConfig.for_model(kind, **config)
        except ValueError as error:
            raise ValueError(f"base.config.model_type={kind}: {error}") from error
        return cls(AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa"), tokenizer)

    @property
    def config(self):
        return self.model.config

    @property
    def width(self) -> int:
        """D, the width of an embedding."""
        return self.model.get_input_embeddings().weight.shape[1]  # of adapted ones too

    @property
    def vocab_size(self) -> int:
        """V, the number of embedding rows."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def max_positions(self) -> int:
        """The longest sequence that the config says the model takes."""
        return int(self.config.max_position_embeddings)

    def learned_positions(self) -> bool:
        """Whether positions are rows of a table (GPT-2, OPT), which ends, and not a rotation, which goes on."""
        tables = [m for m in self.model.get_decoder().modules() if isinstance(m, nn.Embedding)]
        own = self.model.get_input_embeddings()
        return any(table is not own and table.weight.shape[0] >= self.max_positions for table in tables)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> embeddings [B, T, D]."""
        return self.model.get_input_embeddings()(ids)

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor | None,
        mask: Tensor | str | None = None,
        cache=None,
        sigma: Tensor | None = None,
        last: int | None = None,
    ) -> Tensor:
        """embeddings [B, Q, D], positions [B, Q], mask bool [B or 1, 1, Q, S] (True = sees) -> hidden [B, Q, D].

        ``mask=CAUSAL`` means ``masks.causal(Q)``, for any positions, and is faster. It may fill an empty cache.
        ``mask=BEHIND`` means rows behind all S - Q columns of the cache: each sees these, itself and the rows before
        it. It is faster too, has no gradient, and with ``last`` only the last so many states mean something.

        ``sigma`` [B, Q]: standard deviation of each position in tokens, see ``gaussian_rope``; ``None``: points.

        Without a mask the pass is plain causal from position 0 on. It may fill an empty cache. Positions and a mask
        come together or not at all: transformers reads a jump in positions without a mask as a border between packed
        sequences, and cuts attention there without a word.
        """
        assert (mask is None) == (positions is None), "positions and an explicit 4-D mask come together"
        if mask is None or mask is CAUSAL:
            assert cache is None or cache.get_seq_length() == 0, "a pass over a filled cache needs an explicit 4-D mask"
        if mask is BEHIND:
            return self._suffix(embeddings, positions, cache, sigma, Suffix(last=last))
        if mask is CAUSAL:
            return self._plain_causal(embeddings, positions, cache, sigma)
        if mask is not None:
            assert mask.ndim == 4 and mask.dtype == torch.bool, "the mask is bool [B, 1, Q, S]"
            mask = masks.additive(mask, self._pass_dtype(embeddings))
        return self._decoded(embeddings, positions, mask, cache, sigma)

    def _decoded(
        self, embeddings: Tensor, positions, mask: Tensor | None, cache, sigma: Tensor | None, **seen
    ) -> Tensor:
        """The model's own backbone; ``seen`` reaches the attention function of every layer."""
        decoder = self.model.get_decoder()
        with spread(decoder, sigma):
            output = decoder(
                inputs_embeds=embeddings,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
                **seen,
            )
        return output.last_hidden_state

    def _plain_causal(self, embeddings: Tensor, positions: Tensor, cache, sigma: Tensor | None) -> Tensor:
        """``forward`` under ``CAUSAL``."""
        seen, some = PlainCausal(), masks.causal(1, embeddings.device)  # see _attention
        with self._attention(plain_causal.NAME):
            hidden = self._decoded(embeddings, positions, some, cache, sigma, plain_causal=seen)
        self._require_interface(seen.layers > 0)
        return hidden

    def forward_runs(
        self, embeddings: Tensor, positions: Tensor, kv_cache, runs: list[Run], last: int, sigma: Tensor | None = None
    ) -> Tensor:
        """``forward_branches`` for branches of any lengths, one behind the other, each alone. Without gradient.

        Args:
            embeddings: [1, M, D], the rows of all runs.
            positions: [1, M].
            kv_cache: keys and values of a pass over the documents, per layer.
            runs: which rows are a branch, and which cached columns it sees.
            last: rows at the end of each run whose final states are read.
            sigma: [1, M].

        Returns:
            Final hidden states [1, M, D]; only the last ``last`` of each run mean something.
        """
        return self._suffix(embeddings, positions, None, sigma, Suffix(runs, kv_cache, last))

    @torch.no_grad()
    def forward_each(self, embeddings: Tensor, positions: Tensor, caches: Sequence) -> Tensor:
        """One new token of each of N histories, in one pass.

        Args:
            embeddings: [N, 1, D].
            positions: [N, 1].
            caches: of each history, filled; they get a column more.

        Returns:
            Final hidden states [N, 1, D]. Rounding aside they are those of N passes.
        """
        each, some = EachCache(caches), masks.causal(1, embeddings.device)  # see _attention
        with self._attention(each_cache.NAME):
            hidden = self._decoded(embeddings, positions, some, None, None, each=each)
        self._require_interface(each.layers > 0)
        return hidden

    @torch.no_grad()
    def _suffix(self, embeddings: Tensor, positions: Tensor, cache, sigma: Tensor | None, suffix: Suffix) -> Tensor:
        layers, rows = layers_of(self.model.get_decoder()), suffix.rows(embeddings.shape[1])
        suffix.final = len(layers) - 1
        some = masks.causal(1, embeddings.device)  # see _attention
        with (
            self._attention(suffix_attention.NAME),
            narrowed(layers[-1], rows) if suffix.last is not None else nullcontext(),
        ):
            hidden = self._decoded(embeddings, positions, some, cache, sigma, suffix=suffix)
        self._require_interface(suffix.layers > 0)
        return hidden

    @contextmanager
    def _attention(self, name: str):
        """Inside, every layer attends by the function of that name, which gets the keyword arguments of the pass.

        The pass needs some 4-D mask, of any content: with one, transformers does not read jumps in position as borders.
        The function has the real mask.
        """
        config = self.model.get_decoder().config
        usual = config._attn_implementation
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = usual

    def _require_interface(self, used: bool) -> None:
        if not used:
            raise ValueError(f"base: {self.config.model_type} does not use transformers' attention interface")

    def read(self, embeddings: Tensor, positions: Tensor, lengths: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Read working contexts: tokens and gists in the order of their positions, each row sees all before it.

        Args:
            embeddings: [B, W, D], padded on the right with anything.
            positions: [B, W], ascending, with jumps where gists stand for more than one token.
            lengths: [B], entries of each working context.
            sigma: [B, W], as ``GistNet.spread`` gives it for LODs; ``None``: positions are points.

        Returns:
            Final hidden states [B, W, D], 0 in the padding.

        Raises:
            ValueError: shapes that do not belong together.
        """
        b, w, _ = embeddings.shape
        for name, given, wanted in (
            ("positions", positions, (b, w)),
            ("lengths", lengths, (b,)),
            ("sigma", sigma, (b, w)),
        ):
            if given is not None and given.shape != wanted:
                raise ValueError(f"working context: {name} has shape {list(given.shape)}, wanted {list(wanted)}")
        mask = torch.arange(w, device=embeddings.device) < lengths[:, None]  # [B, W]
        # No row sees the padding behind it. Still the padding is zeroed: a NaN in it would spread, since 0 times NaN is
        # NaN, and some rotary embeddings look at the largest position of the pass.
        hidden = self(
            torch.where(mask[..., None], embeddings, 0.0),
            torch.where(mask, positions, 0),
            CAUSAL,
            sigma=None if sigma is None else torch.where(mask, sigma, 0.0),
        )
        return torch.where(mask[..., None], hidden, 0.0)

    def forward_branches(
        self,
        embeddings: Tensor,
        positions: Tensor,
        kv_cache,
        cache_len: Tensor,
        cache_start: Tensor | None = None,
        slots=None,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """The packed pass: N branches of R rows per document, each over its own share of one cached prefix.

        Args:
            embeddings: [B, N, R, D].
            positions: [B, N, R].
            kv_cache: keys and values of a pass over the documents, per layer.
            cache_len: cached columns that each branch sees, [B, N].
            cache_start: the first cached column that each branch sees, [B, N]; ``None``: 0.
            slots: keys and values of one more column for each branch, per layer [B, key-value heads, N, head width].
            sigma: standard deviation of the rows' positions [B, N, R], see ``gaussian_rope``; ``None``: points. Cached
                keys are read as they are.

        Returns:
            Final hidden states [B, N, R, D]; row (k, r) saw columns cache_start[k] <= t < cache_len[k], the slot of
            its branch and rows r' <= r of its own branch.

        Raises:
            ValueError: the model's attention does not go through transformers' attention interface.
        """
        b, n, r, d = embeddings.shape
        branches = Branches(kv_cache, cache_len, r, self._pass_dtype(embeddings), cache_start, slots)
        rows, places = embeddings.reshape(b, n * r, d), positions.reshape(b, n * r)
        sigma = None if sigma is None else sigma.reshape(b, n * r)
        with self._attention(packed_attention.NAME):
            some = masks.causal(1, embeddings.device)  # see _attention
            hidden = self._decoded(rows, places, some, None, sigma, branches=branches)
        self._require_interface(branches.layers == len(kv_cache))
        return hidden.view(b, n, r, d)

    @staticmethod
    def _pass_dtype(embeddings: Tensor) -> torch.dtype:
        kind = embeddings.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else embeddings.dtype

    def logits(self, hidden: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Final hidden states [..., D] -> logits [..., V], with the model's own scaling and soft cap.

        Args:
            weights: of the head, in another precision; ``None``: its own.
        """
        head = self.model.get_output_embeddings()
        logits = head(hidden) if weights is None else torch.func.functional_call(head, weights, (hidden,))
        if scale := getattr(self.config, "logits_scaling", None):
            logits = logits / scale
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def twin(self) -> "BaseLM":
        """A base LM with the same weights, shared, in modules of its own: an adapter in one is not in the other."""
        return copy.deepcopy(self, {id(p): p for p in self.parameters()} | {id(self.tokenizer): self.tokenizer})

    def freeze(self) -> "BaseLM":
        """Eval mode for good, no parameter takes a gradient."""
        self.requires_grad_(False)
        self._frozen = True
        return self.eval()

    def train(self, mode: bool = True) -> "BaseLM":
        # Lightning calls train() on the whole stage: a frozen base must not wake up.
        return super().train(mode and not getattr(self, "_frozen", False))

    @torch.no_grad()
    def embeddings(self) -> Tensor:
        """What the model reads for each id, [V, D] in fp32: its table, scaled where the model scales it."""
        return self.embed(torch.arange(self.vocab_size, device=self.model.device)).float()

    @torch.no_grad()
    def embedding_rms(self) -> float:
        """Root mean square of token embeddings as the model reads them: the scale that a gist must have.

        A GistNet is known by it, so it must be the same number everywhere: a sum in fp32 depends on the number of
        threads in its last digits, one in fp64, rounded, does not.
        """
        squares, table = 0.0, self.embeddings()
        for rows in table.split(8192):
            squares += rows.double().pow(2).sum().item()
        return torch.tensor((squares / table.numel()) ** 0.5, dtype=torch.float32).item()

    @torch.no_grad()
    def _refuse_unsupported(self) -> None:
        name = self.config.model_type
        kinds = getattr(self.config, "layer_types", None)
        if "sliding_attention" in kinds if kinds else getattr(self.config, "sliding_window", None):
            raise ValueError(f"base: {name} uses sliding-window attention, whose cut cache the packed pass cannot read")
        for module in self.model.get_decoder().modules():
            ropes = getattr(module, "rope_type", None)
            for rope in ropes.values() if isinstance(ropes, dict) else [ropes]:
                # The longest row of a pass decides how all rows are rotated; cached rows were rotated by another one.
                if rope == "longrope" or "dynamic" in str(rope):
                    raise ValueError(
                        f"base: {name} has rope_type={rope}, whose frequencies depend on the length of a pass: packed"
                        " and plain passes would differ"
                    )
        if self.model.device.type == "meta":
            return
        training = self.model.training
        self.model.eval()
        ids = torch.arange(min(4, self.vocab_size), device=self.model.device)[None]
        try:
            mine = self.logits(self(self.embed(ids), None))
        except TypeError as error:
            raise ValueError(f"base: {name} does not take inputs_embeds ({error})") from error
        theirs = self.model(input_ids=ids, use_cache=False).logits
        try:
            packed = self.logits(self(self.embed(ids), torch.arange(ids.shape[1], device=ids.device)[None], CAUSAL))
        except (
            TypeError,
            ValueError,
        ):  # it does not accept the keyword arguments that its attention should get, or the mask
            self._require_interface(False)
        self.model.train(training)
        # In bf16 two ways to attend differ by rounding, more than this in single logits.
        far = max((logits - theirs).float().norm() / theirs.float().norm() for logits in (mine, packed))
        if not far < (5e-2 if theirs.dtype in (torch.bfloat16, torch.float16) else 1e-3):
            raise ValueError(f"base: {name} scales its embeddings or logits in a way that is not supported")
