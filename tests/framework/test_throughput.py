from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megactx.framework.callbacks import throughput
from megactx.framework.callbacks.throughput import Throughput, peak
from megactx.gist import GistNet
from megactx.gist.loss import Context
from megactx.gist.losses.block import Block
from megactx.gist.losses.history import History
from megactx.gist.losses.level2 import Level2
from megactx.gist.losses.questions import Questions
from megactx.gist.losses.recall import Recall
from megactx.gist.losses.reconstruction import Reconstruction
from megactx.gist.substitution import substituted
from megactx.lm import BaseLM
from megactx.lm.chunked_head import score
from megactx.lm.prefill import blocks, prefill, rows_at
from megactx.stages.work import Work


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


class Run:
    """A callback, driven step by step."""

    def __init__(self, clock, processes: int = 1, every: int = 2):
        self.clock, self.logged = clock, {}
        self.trainer = SimpleNamespace(
            global_step=0,
            log_every_n_steps=every,
            world_size=processes,
            precision="32-true",
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        self.stage = SimpleNamespace(log=self.logged.__setitem__, amounts=lambda batch: batch)
        self.callback = Throughput()
        self.callback.setup(self.trainer, self.stage, "fit")
        self.callback.on_train_start(self.trainer, self.stage)

    def batch(self, batch, seconds: float = 1.0, step: bool = True) -> None:
        self.clock.now += seconds
        self.trainer.global_step += step
        self.callback.on_train_batch_end(self.trainer, self.stage, None, batch, 0)


def spans() -> dict:
    """What a stage says of two documents of 10 and 6 tokens with three blocks each."""
    return {"tokens": torch.tensor(16), "documents": 2, "spans": 6}


def test_speeds_are_amounts_by_time(clock):
    run = Run(clock)
    run.batch(spans())
    assert run.logged == {}  # a row every second step
    run.batch(spans(), seconds=3.0)
    assert run.logged == {
        "speed/tokens_per_second": 32 / 4,
        "speed/documents_per_second": 4 / 4,
        "speed/spans_per_second": 12 / 4,
        "speed/step_seconds": 2.0,
    }
    for _ in range(2):
        run.batch(spans(), seconds=8.0)
    assert run.logged["speed/tokens_per_second"] == 32 / 16  # the next row is about the steps since the last one


def test_accumulated_batches_belong_to_one_step(clock):
    run = Run(clock, every=1)
    run.batch(spans(), step=False)
    run.batch(spans(), step=False)
    assert run.logged == {}
    run.batch(spans(), step=True)
    assert run.logged["speed/step_seconds"] == 3.0 and run.logged["speed/tokens_per_second"] == 16.0


def test_the_time_of_a_validation_is_left_out(clock):
    run = Run(clock)
    run.batch(spans())
    run.callback.on_validation_start(run.trainer, run.stage)
    clock.now += 1000.0
    run.callback.on_validation_end(run.trainer, run.stage)
    run.batch(spans())
    assert run.logged["speed/step_seconds"] == 1.0


def test_several_processes_are_counted_together(clock):
    run = Run(clock, processes=4, every=1)
    run.batch(spans())
    assert run.logged["speed/tokens_per_second"] == 64.0


def test_a_stage_that_says_less_of_a_batch_does_no_harm(clock):
    run = Run(clock, every=1)
    run.batch({"tokens": 16})
    assert run.logged == {"speed/tokens_per_second": 16.0, "speed/step_seconds": 1.0}
    run.batch({})
    assert run.logged["speed/tokens_per_second"] == 16.0


def test_mfu_is_work_by_time_by_the_peak_and_absent_where_the_card_is_not_known(clock):
    run = Run(clock, every=1)
    run.batch(spans(), seconds=2.0)
    assert "speed/mfu" not in run.logged
    run.callback.peak, run.stage.flops = 1000.0, lambda batch: torch.tensor(500.0)
    run.batch(spans(), seconds=2.0)
    assert run.logged["speed/mfu"] == 0.25


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_the_peak_is_found_by_the_name_of_the_card(name, flops):
    assert peak(name) == flops


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = dict(model_type="llama", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    config |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    return BaseLM.from_config(config)


class Products(TorchDispatchMode):
    """Counts the FLOPs of the matrix products of linear layers; attention has its own. Backward included."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_the_formula_for_gists_is_what_the_passes_do_apart_from_attention(base):
    base.requires_grad_(False)
    nets = nn.ModuleDict({name: GistNet(64, 1.0, type="mean", head="linear", skip="none") for name in ("a", "b")})
    ids, starts = torch.randint(512, (2, 256)), torch.tensor([[32, 96, 160]]).expand(2, -1)
    with Products() as counter:
        read = prefill(base, ids)
        vectors = base.embed(blocks(ids, starts, 32)).flatten(0, 1)
        gists = torch.stack([net.encode_block(vectors).view(2, 3, -1) for net in nets.values()])
        hidden = substituted(base, read, starts, gists, [16, 16], 32, 32)
        after = rows_at(read.hidden, starts + 31, 32).flatten(0, 2)
        loss, _ = score(base, hidden.flatten(1, 3), after, blocks(ids, starts + 32, 32).flatten())
        loss.mean().backward()
    work = Work.of_gists(base, nets, [Block()], 32)
    batch = {"ids": ids, "lengths": torch.tensor([256, 256]), "block_starts": starts}
    linear = Work(work.body, work.head, 0, work.carriers, work.horizon, work.nets, 32, work.losses)
    assert float(linear(batch)) == pytest.approx(counter.flops, rel=0.02)
    # Attention: L A (2 T^2 per document, 8 columns per row of a branch), by a plain loop.
    columns = sum(int(s) + r + 1 for s in starts.flatten() for r in range(32))
    attention = 3 * 64 * (2 * 2 * 256**2 + 2 * 8 * columns)
    assert float(work(batch)) - float(linear(batch)) == pytest.approx(attention)


@pytest.mark.parametrize(
    ("loss", "limit"),
    [
        (Block(), 0.02),
        (History(1.0, segment=64, recency=64), 0.05),
        (Recall(1.0, recency=64), 0.05),
        (Reconstruction(1.0, spans=2), 0.1),  # its request's length is a guess
        (Level2(1.0), 0.02),
        (Questions(1.0), 0.15),  # how long answers are is a guess
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_loss_counts_the_rows_that_it_passes(base, tiny_tokenizer, loss, limit):
    base.requires_grad_(False)
    base.tokenizer = tiny_tokenizer
    k = 8
    nets = nn.ModuleDict({"a": GistNet(64, 1.0, type="mean", head="linear", skip="none", block_size=k)})
    batch = {"ids": torch.randint(512, (2, 256)), "lengths": torch.tensor([256, 256])}
    batch |= {"block_starts": torch.tensor([[32, 96, 160]]).expand(2, -1), "span_starts": torch.full((2, 1), 128)}
    batch |= {"segments": torch.tensor([[160], [160]]), "copied_blocks": torch.tensor([[16], [32]])}
    batch |= {"contexts": torch.randint(512, (2, 65)), "context_starts": 1 + torch.arange(0, 64, k).expand(2, -1)}
    batch |= {"questions": torch.randint(512, (2, 24)), "answers": torch.tensor([[20, 21, 22, 23]] * 2)}
    with Products() as counter:
        losses, _ = loss(Context(base, nets, prefill(base, batch["ids"]), batch, 32))
        losses.sum().backward()
    work = replace(Work.of_gists(base, nets, [loss], 32), attention=0)
    assert float(work(batch)) == pytest.approx(counter.flops, rel=limit)
    assert float(work({"ids": batch["ids"], "lengths": batch["lengths"]})) < float(work(batch))


def test_the_formula_for_training_a_base_is_what_the_passes_do_apart_from_attention(base):
    base.requires_grad_(True)
    ids = torch.randint(512, (2, 64))
    with Products() as counter:
        base.logits(base(base.embed(ids), None)).sum().backward()
    work = Work.of_base(base)
    assert Work(work.body, work.head, 0)({"ids": ids}) == pytest.approx(counter.flops, rel=0.02)
    assert work({"ids": ids}) - Work(work.body, work.head, 0)({"ids": ids}) == 6 * 3 * 64 * 2 * 64**2


def test_reading_off_the_work_draws_no_random_numbers(base):
    nets = nn.ModuleDict({"gistnet": GistNet(64, 1.0, dropout=0.5)}).train()
    state = torch.get_rng_state()
    assert Work.of_gists(base, nets, [Block()], 32).nets > 0
    assert torch.equal(torch.get_rng_state(), state)
