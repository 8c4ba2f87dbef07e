"""The memory that a step is said to take is what it takes."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megactx.framework.config.search_path import compose
from megactx.gist import GistNet
from megactx.gist.memory_estimate import in_words, memory_estimate
from megactx.gist.substitution import substituted
from megactx.lm import BaseLM
from megactx.lm.prefill import prefill

REPOSITORY = Path(__file__).parents[2]
SMALL = dict(vocab_size=512, hidden_size=128, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=1, bos_token_id=0, eos_token_id=None)


def benchmark():
    spec = importlib.util.spec_from_file_location("shapes", REPOSITORY / "benchmarks" / "shapes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept_for_backward(base, batch, tokens, spans, horizon, carriers):
    """Bytes of the storages that the packed pass keeps, other than weights and cache; and bytes of the cache."""
    ids = torch.randint(2, base.vocab_size, (batch, tokens))
    last = tokens - 32 - horizon
    starts = torch.linspace(1, last // 32, spans).long().mul(32).expand(batch, -1)
    read = prefill(base, ids)
    gists = torch.randn(carriers, batch, spans, base.width, requires_grad=True)
    cache = [tensor for layer in read.cache for tensor in layer]
    known = {t.untyped_storage().data_ptr() for t in [*base.parameters(), *cache]}
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        substituted(base, read, starts, gists, [31] * carriers, 32, horizon)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for at, size in storages.items() if at not in known), sum(t.nbytes for t in cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "smollm3"])
def test_attention_rows_and_cache_are_what_the_packed_pass_really_keeps(kind, dtype):
    torch.manual_seed(0)
    base = BaseLM.from_config({**SMALL, "model_type": kind}).freeze().to(dtype)
    nets = [GistNet(128, 1.0), GistNet(128, 1.0, type="mean", head="linear", skip="none")]
    parts = memory_estimate(base, nets, batch=2, tokens=1024, spans=4, horizon=32, device="cpu")
    kept, cache = kept_for_backward(base, 2, 1024, 4, 32, len(nets))
    assert parts["attention"] + parts["rows"] == pytest.approx(kept, rel=0.1)
    assert parts["cache"] == cache
    assert parts["base"] == sum(p.nbytes for p in base.parameters())
    assert parts["nets"] == 16 * sum(p.numel() for net in nets for p in net.parameters())


def test_more_branches_than_one_group_holds_see_the_document_once_per_group():
    with torch.device("meta"):
        base = BaseLM.from_config({**SMALL, "model_type": "llama"})
    one, two = (memory_estimate(base, [torch.nn.Identity()], 1, 65536, spans, 32, "cuda") for spans in (128, 129))
    assert two["attention"] / one["attention"] > 1.1
    assert two["rows"] / one["rows"] == pytest.approx(129 / 128)


def test_on_a_cpu_the_groups_share_the_documents_keys_and_the_memory_for_scores():
    with torch.device("meta"):
        base = BaseLM.from_config({**SMALL, "model_type": "llama"})
    one, two = (memory_estimate(base, [torch.nn.Identity()], 1, 4096, spans, 32, "cpu") for spans in (8, 16))
    assert two["attention"] == 2 * one["attention"] and two["scores"] == one["scores"] > 0


def test_large_and_small_figures_can_be_read():
    assert in_words({"base": 6.15e9, "nets": 0.5e9}) == "about 6.7 GB (base 6.2, nets 0.5)"
    assert in_words({"base": 2.5e6}) == "about 2.5 MB (base 2.5)"


@pytest.mark.parametrize("name", ["smollm3_3b_stage1", "smollm2_135m_stage1"])
def test_an_experiment_on_a_public_model_states_the_memory_that_it_needs(name):
    config = benchmark().SHAPES["smollm3" if "smollm3" in name else "smollm2"]
    cfg = compose([f"experiment={name}"])
    with torch.device("meta"):
        base = BaseLM.from_config(config).to(getattr(torch, cfg.base.dtype))
        settings = [cfg.gistnet, *cfg.stage.controls.values()]
        nets = [GistNet(base.width, 1.0, **each) for each in settings]
    tokens = cfg.data.max_tokens or min(16384, base.max_positions)
    shape = (cfg.preset.batch, tokens, cfg.preset.spans, cfg.horizon.tokens)
    parts = memory_estimate(base, nets, *shape)
    comment = (REPOSITORY / "conf" / "experiment" / f"{name}.yaml").read_text()
    stated = float(re.search(r"Memory: about ([\d.]+) GB", comment)[1])
    assert stated == pytest.approx(sum(parts.values()) / 1e9, rel=0.1)
    rows = {part: float(size) for size, part in re.findall(r"#   ([\d.]+)  (\w+)", comment)}
    assert rows.pop("weights") == pytest.approx(parts["base"] / 1e9, abs=0.06)
    assert rows == {part: pytest.approx(parts[part] / 1e9, abs=0.06) for part in parts if part != "base"}
    # A step sees as many documents as the full preset's: only how many at a time is another.
    full = compose(["experiment=gist_stage1"]).preset
    assert cfg.preset.batch * cfg.preset.accumulate == full.batch * full.accumulate


LLAMA_3_2_1B = dict(
    model_type="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
QWEN3_0_6B = dict(
    model_type="qwen3",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize("name", ["smollm2", "qwen3_0_6b", "llama_3_2_1b", "smollm3_3b"])
def test_a_retrofit_of_a_public_model_states_the_memory_that_it_needs(name):
    shapes = {"qwen3_0_6b": QWEN3_0_6B, "llama_3_2_1b": LLAMA_3_2_1B} | benchmark().SHAPES
    cfg = compose([f"experiment=retrofit_{name}"])
    with torch.device("meta"):
        base = BaseLM.from_config(shapes[name.removesuffix("_3b")]).to(getattr(torch, cfg.base.dtype))
        net = GistNet(base.width, 1.0, base=base, **cfg.gistnet)
    shape = (cfg.preset.batch, cfg.data.max_tokens, cfg.preset.spans, cfg.horizon.tokens)
    parts = memory_estimate(base, [net], *shape, "cpu" if cfg.base.dtype == "float32" else "cuda")
    comment = (REPOSITORY / "conf" / "experiment" / f"retrofit_{name}.yaml").read_text()
    assert float(re.search(r"Memory: about ([\d.]+) GB", comment)[1]) == pytest.approx(
        sum(parts.values()) / 1e9, abs=0.06
    )
    rows = {part: float(size) for size, part in re.findall(r"#   ([\d.]+)  (\w+)", comment)}
    assert rows.pop("weights") == pytest.approx(parts["base"] / 1e9, abs=0.06)
    assert rows == {part: pytest.approx(parts[part] / 1e9, abs=0.06) for part in parts if part != "base"}


def test_the_shapes_of_smollm3_take_training_steps(tmp_path, monkeypatch, capsys):
    module = benchmark()
    small = dict(hidden_size=64, vocab_size=512, intermediate_size=128, pad_token_id=1, bos_token_id=0)
    monkeypatch.setitem(module.SHAPES, "smollm3", module.SHAPES["smollm3"] | small | {"eos_token_id": None})
    out = tmp_path / "out.json"
    command = ["--cpu", "--layers", "4", "--tokens", "256", "--spans", "2", "--steps", "2", "--out", str(out)]
    module.main(command)
    said = capsys.readouterr().out
    assert "Memory of a step: about" in said and "tokens/s" in said and out.exists()
    row = json.loads(out.read_text())
    assert len(row["seconds"]) == 2 and all(0 < loss < 100 for loss in row["losses"]) and row["peak"] > 0
    # The base reads 256 tokens, then 2 x 32 rows of both nets, forwards and, for the rows, backwards.
    assert row["flops"] > 2 * 4 * 64 * 3 * 128 * (256 + 2 * 2 * 32) and row["mfu"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_the_shapes_of_smollm3_without_cuda_are_refused_with_what_runs_instead(capsys):
    assert benchmark().main([]) == 2
    assert "no CUDA on this machine; a miniature is --cpu" in capsys.readouterr().err
