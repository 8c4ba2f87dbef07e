"""Trees over a tiny base LM and windows of every shape: what the tests of this room stand on."""

import torch

from megactx.focus import FocusAllocator, moves
from megactx.focus.replay import Replay
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.memory import MegaContextTree, WorkingContext

K, WIDTH, VOCABULARY = 4, 32, 97
REFOCUSES = 3

BASES = {
    "llama": dict(model_type="llama"),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "smollm3": dict(model_type="smollm3", no_rope_layer_interval=2, pad_token_id=0),
}


def small_base(kind: str = "llama") -> BaseLM:
    torch.manual_seed(0)
    config = BASES[kind] | dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64)
    config |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512)
    base = BaseLM.from_config(config)
    for p in base.parameters():  # a random base is indifferent to what it reads
        p.data *= 3
    return base.freeze()


def gistnet(base: BaseLM, **settings) -> GistNet:
    torch.manual_seed(1)
    return GistNet(WIDTH, base.embedding_rms(), block_size=K, num_heads=4, skip="none", **settings).eval()


def tree_of(base: BaseLM, lengths=(150, 97), **settings) -> MegaContextTree:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    with torch.no_grad():
        return MegaContextTree.from_tokens(ids, gistnet(base, **settings), base, torch.tensor(lengths))


def window(tree: MegaContextTree, budget: int = 60, edits: int = 6, seed: int = 0) -> WorkingContext:
    """The cold start with some random edits, so that levels are mixed."""
    context = WorkingContext.recency(tree, budget)
    context.budget = 10**6
    generator = torch.Generator().manual_seed(seed)
    for _ in range(edits):
        legal = moves(context, 8).edits(context)
        legal[torch.randint(len(legal), (1,), generator=generator)].apply(context)
    return context


def following(rows: int, horizon: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, horizon), generator=torch.Generator().manual_seed(3))


def scored(context) -> torch.Tensor:
    """Every legal edit is due: gists want to be expanded, siblings to be collapsed."""
    legal = moves(context, 8)
    score = torch.where(legal.expand, 0.9, 0.0)
    return torch.where(legal.first >= 0, -0.8, score)


def replayed() -> tuple[Replay, list[WorkingContext]]:
    """A replay of row 1, and the windows before and after, as they were."""
    context = WorkingContext.recency(tree_of(small_base()), 60)
    allocator, replay, windows = FocusAllocator(protected=8, cooldown=0), Replay(row=1), [context.copy()]
    for _ in range(REFOCUSES):
        replay.refocus(allocator, context, scored(context), torch.tensor([0.5, 0.25]))
        windows.append(context.copy())
    return replay, windows
