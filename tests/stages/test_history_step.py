"""A step of the gist stage in history mode: what is computed once, what is never left out, what it is said to cost."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from megactx.gist.memory_estimate import memory_estimate
from megactx.stages.gist import GistStage

K, S, R = 8, 16, 16


class Products(TorchDispatchMode):
    """Counts the FLOPs of the matrix products of linear layers, backward included; attention has its own."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


GISTNET = dict(block_size=K, layers=1, num_heads=4, dropout=0.0)
SETTINGS = dict(controls={"mean": {"type": "mean", "head": "linear", "skip": "none", "block_size": K}}, horizon=8)
SETTINGS |= dict(lr=1e-3, muon_lr=None, min_lr=1e-6, weight_decay=0.01, warmup=1, max_steps=4)
SETTINGS |= dict(targets={}, evaluate={"reconstruction": 0})


def stage_with(base_folder, weight: float, recall: float = 0.0, contrastive: float = 0.0) -> GistStage:
    torch.manual_seed(0)
    losses = {"block": {"weight": 1 - weight}, "contrastive": {"weight": contrastive, "margin": 1.9}}
    losses |= {"history": {"weight": weight, "segment": S, "recency": R}, "recall": {"weight": recall, "recency": R}}
    base = {"name": str(base_folder), "dtype": "float32"}
    stage = GistStage(base=base, gistnet=GISTNET, losses=losses, **SETTINGS)
    stage.logged = {}
    stage.log = lambda name, value, **rest: stage.logged.__setitem__(name, float(value))
    return stage


@pytest.fixture
def batch():
    torch.manual_seed(1)
    segments = torch.tensor([[96, 160], [64, 160]])
    return {
        "ids": torch.randint(2, 512, (2, 192)),
        "lengths": torch.tensor([192, 192]),
        "block_starts": torch.tensor([[16, 64, 120], [8, 40, 96]]),
        "segments": segments,
        "copied_blocks": torch.tensor([[24, 40], [16, 80]]),
    }


def test_the_contrastive_term_counts_where_history_has_all_of_the_loss(base_folder, batch):
    without, beside = stage_with(base_folder, 1.0), stage_with(base_folder, 1.0, contrastive=0.5)
    plain, pushed = (stage.training_step(batch, 0) for stage in (without, beside))
    term = beside.logged["train/contrastive"]
    assert term > 0 and float(pushed) == pytest.approx(float(plain) + 0.5 * term, rel=1e-5)
    half = stage_with(base_folder, 0.5, contrastive=0.5)  # the same term, whatever share history has
    half.training_step(batch, 0)
    assert half.logged["train/contrastive"] == pytest.approx(term, rel=1e-5)


def test_carriers_of_old_blocks_are_made_once_for_history_and_recall(base_folder, batch, monkeypatch):
    stage = stage_with(base_folder, 1.0, recall=0.1)
    made = []
    usual = type(stage.main).compress

    def counted(net, base, prefill, starts, *rest):
        made.append(starts.shape)
        return usual(net, base, prefill, starts, *rest)

    monkeypatch.setattr(type(stage.main), "compress", counted)
    stage.training_step(batch, 0).backward()
    assert len(made) == len(stage.nets)
    assert all(p.grad is not None for p in stage.main.parameters())


@pytest.mark.parametrize(("weight", "recall"), [(0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (0.0, 0.1), (0.5, 0.1)])
def test_the_operations_of_a_step_are_those_of_the_formula(base_folder, batch, weight, recall):
    stage = stage_with(base_folder, weight, recall)
    with Products() as counter:
        stage.training_step(batch, 0).backward()
    linear = replace(stage._work(), attention=0)
    assert float(linear(batch)) == pytest.approx(counter.flops, rel=0.1)


@pytest.mark.parametrize(("weight", "recall"), [(1.0, 0.0), (0.5, 0.1)])
def test_the_memory_of_a_step_holds_its_history_windows(base_folder, batch, weight, recall):
    def kept(stage) -> int:
        known = {p.untyped_storage().data_ptr() for p in stage.parameters()}
        found = {}
        with saved_tensors_hooks(
            lambda t: (found.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()), t)[1],
            lambda t: t,
        ):
            stage.training_step(batch, 0)
        return sum(size for at, size in found.items() if at not in known)

    stage, off = stage_with(base_folder, weight, recall), stage_with(base_folder, 0.0)
    shape = (2, 192, 3, 8, "cpu")
    history = dict(weight=weight, recall=recall, segments=2, segment=S, recency=R)
    parts = memory_estimate(stage.base, stage.nets.values(), *shape, history)
    more = kept(stage) - (kept(off) if weight < 1 else 0)
    assert parts["history"] == pytest.approx(more, rel=0.5) and "history" not in memory_estimate(
        off.base, off.nets.values(), *shape
    )


def test_tokens_and_spans_count_what_history_windows_read(base_folder):
    lengths, starts = torch.tensor([192, 100]), torch.zeros(2, 3)
    told = {"ids": torch.zeros(2, 192), "lengths": lengths, "block_starts": starts, "segments": torch.zeros(2, 2)}
    amounts = stage_with(base_folder, 0.5).amounts(told)
    assert amounts == {"tokens": 292 + 4 * (S + R), "documents": 2, "spans": 6 + 4}
