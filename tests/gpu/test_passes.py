"""What makes a pass fast on a card: no wait for every span, one graph to compile, a mask for ``flex_attention``."""

import torch
from hydra.utils import instantiate
from small_base import WIDTH, small
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import default_convert

from megactx.framework.config.search_path import compose
from megactx.gist import GistNet
from megactx.gist.reading import read_carriers
from megactx.lm import packed_attention
from megactx.lm.mega_attention import MegaMask, in_order
from megactx.lm.prefill import prefill
from megactx.runtime.incremental_prefill import IncrementalPrefill

K, H = 8, 6
# What makes the host wait for a card, as the profiler names it; and what asks a tensor for a number, a CPU's too.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
ASKS = ("item", "tolist", "numpy", "cpu", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__")


class Asked(TorchFunctionMode):
    """Counts what asks a tensor for a number. The optimizers' own counts of steps lie on the CPU everywhere."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in ASKS
        return function(*args, **(kwargs or {}))


def waits_of_a_step(device: str, settings: list[str], spans: int) -> int:
    """How often the host needs a number from the device in one step of a recipe, in bf16 and warmed up."""
    cfg = compose([*(s for s in settings if not s.startswith("trainer")), f"preset.spans={spans}"])
    stage, data = (instantiate(part, _convert_="all") for part in (cfg.stage, cfg.datamodule))
    stage.prepare(data)
    data.setup()
    stage.set_dtype(torch.bfloat16)
    stage.to(device)
    batch = {name: v.to(device) if torch.is_tensor(v) else v for name, v in default_convert(data.training[0]).items()}
    optimizer = stage.configure_optimizers()["optimizer"]

    def pass_and_gradient() -> None:
        with torch.autocast(device, torch.bfloat16):
            context = stage.context(batch)
            loss = sum(loss.weight * loss(context)[0].sum() for loss in stage.losses if loss.weight)
        loss.backward()
        stage.configure_gradient_clipping(optimizer, 1.0)

    pass_and_gradient()
    optimizer.step()
    if device == "cpu":
        with Asked() as asked:
            pass_and_gradient()
        return asked.count
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        pass_and_gradient()
        optimizer.step()
    waits = sum(event.count for event in seen.key_averages() if event.key in WAITS)
    return waits - 1  # for the profiler waits too, when it ends


def test_a_step_waits_for_the_device_as_often_with_many_blocks_as_with_few(device, gist_settings):
    few, many = (waits_of_a_step(device, gist_settings, spans) for spans in (2, 5))
    assert few == many <= {"cpu": 2, "cuda": 1}[device]  # on a CPU the blocks are looked at too


def test_the_decoder_of_the_packed_pass_is_one_graph_for_the_compiler(device, monkeypatch):
    monkeypatch.setattr(packed_attention, "BY_PRODUCTS", ())  # a CPU takes the way of a card here
    torch.manual_seed(1)
    base = small("llama").to(device)
    ids, starts = torch.randint(3, 97, (2, 96), device=device), torch.tensor([[K, 80, 40], [48, K, 16]], device=device)
    net = GistNet(WIDTH, base.embedding_rms(), block_size=K, num_heads=4, skip="none").to(device)
    read, graphs = prefill(base, ids), []
    carrier = net.compress(base, read, starts)
    plain = read_carriers(base, read, starts, [carrier], K, H)

    def as_it_is(graph, example):
        graphs.append(graph)
        return graph.forward

    decoder = base.model.get_decoder()
    # fullgraph: a break is an error. A CPU would wait minutes for compiled code, and has the graph all the same.
    compiled = torch.compile(decoder.forward, backend=as_it_is if device == "cpu" else "inductor", fullgraph=True)
    monkeypatch.setattr(decoder, "forward", compiled)
    found = read_carriers(base, read, starts, [carrier], K, H)
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3)
    assert device == "cuda" or len(graphs) == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_tokens_at_fixed_shapes_are_those_of_passes_that_grow_and_ask_the_device_for_nothing(device):
    base = small("llama").to(device)
    ids = torch.randint(3, 97, (2, 130), device=device, generator=torch.Generator(device).manual_seed(1))
    rows, lengths = base.embed(ids[:, :40]), torch.full((2,), 40, device=device)
    places = torch.arange(130, device=device).expand(2, -1)
    plain, graph = IncrementalPrefill(base), IncrementalPrefill(base, graphs=True)
    for window in (rows, rows.flip(1)):
        for reader in (plain, graph):
            reader.read(window, places[:, :40], lengths)
        for at in range(40, 130):  # the buffers grow, and what was recorded is recorded anew
            one = slice(at, at + 1)
            wanted, found = (reader.step(ids[:, one], places[:, one]) for reader in (plain, graph))
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    with Asked() as asked:
        graph.graph._pass(graph.graph.layers())
    assert asked.count == 0


def test_flex_attention_gives_what_attention_under_the_dense_mask_gives(device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block, tokens = 4, 120
    spans = [(i * block**n, block**n) for n in (1, 2, 3) for i in range(tokens // block**n)]
    places = [*((i, 1) for i in range(tokens)), *spans]
    start, width = (torch.tensor(part, device=device)[None] for part in zip(*places, strict=True))
    summary = torch.arange(start.shape[1], device=device)[None] >= tokens
    there = torch.ones_like(summary)
    order = in_order(start, width, summary, there)
    start, width, summary = (part.gather(1, order) for part in (start, width, summary))
    mask = MegaMask(start, width, summary, there, block, segment=16, mid=16, live=16)
    n, draw = start.shape[1], torch.Generator(device).manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 32, device=device, generator=draw) for _ in range(3))
    sparse = create_block_mask(mask.rule(), 1, None, n, n, device=device)
    attend = torch.compile(flex_attention) if device == "cuda" else flex_attention
    found = attend(query, key, value, block_mask=sparse)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask.dense())
    torch.testing.assert_close(found, wanted, rtol=1e-2 if device == "cuda" else 1e-4, atol=1e-3)
