"""Every way to compress a block through every check. A new file of carriers, or a new pooling, is tested as it is."""

import inspect

import pytest
import torch

from megactx.gist import GistNet, carriers, poolings
from megactx.gist.carrier import Compressor, KVSlots, SoftTokens
from megactx.gist.carriers.history_oracle import HistoryOracle
from megactx.gist.parts import find, names
from megactx.lm.prefill import prefill

K, H, LENGTH = 4, 4, 64
GISTNETS = {f"gistnet {name}": {"pooling": name} for name in names(poolings)}
GISTNETS |= {"gistnet of hidden states": {"input": "hidden"}, "gistnet with context": {"context": 2 * K}}
SLOTS = "gistnet of two vectors"
GISTNETS |= {SLOTS: {"slots": 2}}
CARRIERS = [*names(carriers), *GISTNETS]
# Two steps of Adam move each channel by its gradient's sign, which bf16 turns where the gradient is near 0.
BF16, FITTED = 0.02, 0.1  # relative errors; measured are 0.008 and 0.02


@pytest.fixture
def base(make_base):
    return make_base()


def made(name: str, base, block: int = K) -> Compressor:
    torch.manual_seed(1)
    if name in GISTNETS:
        net = GistNet(base.width, base.embedding_rms(), block_size=block, num_heads=4, **GISTNETS[name])
        for p in net.parameters():  # a fresh correction is 0: nothing that it reads would show
            p.data += 0.02 * torch.randn_like(p)
        return net.eval()
    kind = find(carriers, name, "carrier")
    given = {"base": base, "rms": base.embedding_rms(), "block_size": block, "rank": 2, "steps": 2, "samples": 2}
    given |= {"horizon": H, "segment": 8, "recency": 8}
    wanted = inspect.signature(kind).parameters
    missing = [key for key, p in wanted.items() if p.default is p.empty and key not in given]
    assert not missing, f"{name} takes {missing}: say here what they are in this test"
    return kind(**{key: value for key, value in given.items() if key in wanted}).eval()


def documents() -> torch.Tensor:
    return torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def compressed(net: Compressor, base, ids, only: slice = slice(None)) -> SoftTokens | KVSlots:
    """Carriers of three blocks of each document; of some documents ``only``."""
    starts = [[4, 16, 24], [8, 12, 32]]
    if isinstance(net, HistoryOracle):  # which takes all blocks behind the sink
        starts = [[net.block_size * n for n in (1, 2, 3)]] * 2
    return net.compress(base, prefill(base, ids[only], with_states=True), torch.tensor(starts)[only])


def flat(carrier: SoftTokens | KVSlots) -> torch.Tensor:
    """All of its numbers, a row per block: [B, N, numbers]."""
    if isinstance(carrier, SoftTokens):
        return carrier.vectors.flatten(2).float()
    parts = [part.transpose(1, 2).flatten(2) for layer in carrier.layers for part in layer]
    return torch.cat(parts, dim=-1).float()


def assert_shapes(net: Compressor, base, carrier: SoftTokens | KVSlots):
    config = base.config
    assert isinstance(carrier, SoftTokens if net.makes_vectors else KVSlots)
    if net.makes_vectors:
        shape = (2, 3, base.width) if net.slots == 1 else (2, 3, net.slots, base.width)
        assert carrier.vectors.shape == shape and carrier.first == 0
        offsets = [carrier.offset] if net.slots == 1 else list(carrier.offset)
        assert len(offsets) == net.slots and offsets[-1] == net.offset
        assert 0 <= min(offsets) <= net.offset < net.block_size
        assert carrier.bytes_per_block() == 2 * base.width * net.slots
    else:
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        assert len(carrier.layers) == config.num_hidden_layers and carrier.first == 1
        assert {part.shape for layer in carrier.layers for part in layer} == {(2, heads, 3, width)}
        assert carrier.bytes_per_block() == 2 * config.num_hidden_layers * heads * width * 2
    assert torch.isfinite(flat(carrier)).all()
    assert torch.pdist(flat(carrier).flatten(0, 1)).min() > 1e-3, "two blocks have one carrier"


@pytest.mark.parametrize("name", CARRIERS)
def test_there_is_one_carrier_per_block_of_the_shape_that_it_says(name, base):
    net = made(name, base)
    assert_shapes(net, base, compressed(net, base, documents()))


@pytest.mark.parametrize("name", CARRIERS)
def test_a_block_of_one_token_is_compressed(name, base):
    if name == SLOTS:
        with pytest.raises(ValueError, match="gistnet.slots=2 does not divide block_size=1"):
            made(name, base, block=1)
        return
    net = made(name, base, block=1)
    assert_shapes(net, base, compressed(net, base, documents()))


@pytest.mark.parametrize("name", CARRIERS)
def test_bf16_gives_what_fp32_gives_but_for_rounding(name, base):
    net, ids = made(name, base), documents()
    exact = flat(compressed(net, base, ids))
    base.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = flat(compressed(net, base, ids))
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert error < (FITTED if "oracle" in name else BF16)


@pytest.mark.parametrize("name", CARRIERS)
def test_padding_on_the_right_changes_nothing(name, base):
    net, ids = made(name, base), documents()
    padded = torch.cat([ids, torch.zeros_like(ids[:, :16])], dim=1)  # as batches pad
    expected = flat(compressed(net, base, ids))
    torch.testing.assert_close(flat(compressed(net, base, padded)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CARRIERS)
def test_other_documents_of_the_batch_change_nothing(name, base):
    net, ids = made(name, base), documents()
    both = flat(compressed(net, base, ids))
    for b in range(2):
        alone = flat(compressed(net, base, ids, slice(b, b + 1)))
        torch.testing.assert_close(both[b : b + 1], alone, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", CARRIERS)
def test_a_span_of_blocks_has_a_gist_of_gists_or_is_refused(name, base):
    net, read = made(name, base), prefill(base, documents(), with_states=True)
    starts = torch.tensor([[16, 32], [32, 16]])
    if not net.makes_levels:
        with pytest.raises(ValueError, match=f"{type(net).__name__} makes no gists of gists: level=2 is not allowed"):
            net.compress_level(base, read, starts, 2)
        return
    gists = net.compress_level(base, read, starts, 2)
    assert gists.vectors.shape == (2, 2, base.width) and gists.offset == net.offset_in(K * K)
    if net.left_context:  # which sees more than its own span
        return
    below = net.compress(base, read, (starts[..., None] + torch.arange(0, K * K, K)).flatten(1)).vectors
    torch.testing.assert_close(gists.vectors.flatten(0, 1), net.encode_block(below.view(4, K, -1)))
