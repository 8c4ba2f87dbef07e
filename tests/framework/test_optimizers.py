"""One optimizer for every stage: Newton-Schulz against a slow reference, its precision, and explicit decay."""

import pytest
import torch
from torch import nn

from megactx.framework import optimizers
from megactx.framework.optimizers import Muon, MuonWithAdamW, fast_dtype, floor_of, newton_schulz, warmup_cosine
from megactx.framework.run import device

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # torch's own


@pytest.fixture
def units(monkeypatch):
    """Sets what the CPU is believed to have, for this test only."""

    def believe(name: str):
        monkeypatch.setenv("MEGACTX_CPU_BF16", name)
        device.cpu_bf16_units.cache_clear()

    yield believe
    monkeypatch.undo()
    device.cpu_bf16_units.cache_clear()


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The same polynomial on the singular values, in fp64: what the products compute."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s, (a, b, c) = s / s.norm(), COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (16, 64)])
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape):
    matrices = torch.randn(3, *shape)
    expected = torch.stack([by_singular_values(matrix) for matrix in matrices])
    found = newton_schulz(matrices, COEFFICIENTS, 5, 1e-7)
    assert torch.allclose(found.double(), expected, atol=2e-5)


@pytest.mark.parametrize(("name", "dtype"), [("none", torch.float32), ("amx_bf16", torch.bfloat16)])
def test_a_cpu_without_bf16_units_orthogonalises_in_fp32_any_other_in_bf16(units, monkeypatch, name, dtype):
    units(name)
    seen = []
    made = newton_schulz
    monkeypatch.setattr(optimizers, "newton_schulz", lambda x, *rest: seen.append(x.dtype) or made(x, *rest))
    weight = nn.Parameter(torch.randn(4, 8))
    weight.grad = torch.randn(4, 8)
    Muon([weight], lr=0.1).step()
    assert seen == [dtype] and weight.dtype == torch.float32
    assert fast_dtype(torch.device("cuda")) is torch.bfloat16


@pytest.mark.parametrize(("name", "tolerance"), [("none", 3e-2), ("amx_bf16", 1e-2)])
def test_steps_are_those_of_torchs_muon_whatever_the_shapes(units, name, tolerance):
    units(name)
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 24), (24, 8), (8, 8), (5, 7)]
    weights = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    optimizer, reference = Muon(ours, lr=0.1, weight_decay=0.2), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=tolerance)


def test_what_a_group_learns_does_not_depend_on_the_groups_beside_it():
    def trained(beside: bool) -> torch.Tensor:
        torch.manual_seed(0)
        vector, matrix = nn.Parameter(torch.ones(4)), nn.Parameter(torch.randn(4, 4))
        groups = [{"params": [vector], "lr": 0.1, "weight_decay": 0.5}]
        if beside:
            groups.append({"params": [matrix], "lr": 0.1, "weight_decay": 0.5, "muon": True})
        optimizer = MuonWithAdamW(groups)
        for _ in range(3):
            vector.grad, matrix.grad = torch.zeros(4), torch.ones(4, 4)
            optimizer.step()
        return vector.detach()

    alone = trained(False)
    assert torch.equal(alone, trained(True))
    assert torch.allclose(alone, torch.full((4,), 0.95**3))  # decay alone moves what has no gradient


def test_a_group_that_does_not_say_its_decay_is_refused():
    with pytest.raises(AssertionError, match="the decay of every group"):
        MuonWithAdamW([{"params": [nn.Parameter(torch.ones(2))], "lr": 0.1}])


@pytest.mark.parametrize(
    ("least", "peak", "end"), [(1e-6, 1e-3, 1e-3), (0.0, 1e-3, 0.0), (1e-6, 0.0, 1.0), (1e-3, 1e-4, 1.0)]
)
def test_a_schedule_ends_at_its_least_rate_and_never_above_its_peak(least, peak, end):
    floor = floor_of(least, peak)
    assert floor == pytest.approx(end)
    assert warmup_cosine(100, 10, 100, floor) == pytest.approx(end) and warmup_cosine(10, 10, 100, floor) == 1.0
