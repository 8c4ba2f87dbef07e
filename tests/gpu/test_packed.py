"""The packed pass and the chunked head give what plain passes give, on every device and in both precisions."""

import pytest
import torch
import torch.nn.functional as F
from small_base import WIDTH, small

from megactx.gist import GistNet
from megactx.gist.carriers.avgpool import AvgPool
from megactx.gist.reading import read_carriers
from megactx.lm import chunked_head, packed_attention
from megactx.lm.prefill import blocks, prefill, rows_at

K, H = 8, 6
# Relative error of a hidden state and of a gradient. bf16 has 8 bits, and 4 layers round on both sides.
NEAR = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.05, 0.1)}
both = pytest.mark.parametrize("dtype", NEAR, ids=["fp32", "bf16"])


def error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((mine.float() - theirs.float()).norm() / theirs.float().norm()).item()


@pytest.fixture
def several_groups(monkeypatch, device):
    """Rows in groups of 4 branches, as those of a real batch are."""
    monkeypatch.setitem(packed_attention.ROWS_PER_GROUP, device, 4 * H)


def documents(device: str, dtype: torch.dtype):
    torch.manual_seed(1)
    base = small("llama").to(device, dtype)
    ids, starts = torch.randint(3, 97, (2, 96)), torch.tensor([[K, 80, 40], [48, K, 16]])
    return base, ids.to(device), starts.to(device)


def one_by_one(base, ids, starts, gists, offset):
    """A plain pass over text, gist and continuation for every block: hidden states [B, N, H, D]."""
    found = []
    for b, n in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        s = int(starts[b, n])
        after = torch.arange(s + K, s + K + H - 1, device=ids.device)
        gist = gists[b, n, None].to(base.model.dtype)
        rows = torch.cat([base.embed(ids[b, :s]), gist, base.embed(ids[b, after])])[None]
        place = torch.arange(s + 1, device=ids.device)
        place[s] = s + offset
        lengths = torch.tensor([rows.shape[1]], device=ids.device)
        found.append(base.read(rows, torch.cat([place, after])[None], lengths)[0, s:])
    return torch.stack(found).view(2, 3, H, -1)


@both
def test_the_packed_pass_and_its_gradient_are_those_of_a_pass_per_block(device, dtype, several_groups):
    base, ids, starts = documents(device, dtype)
    net = GistNet(WIDTH, base.embedding_rms(), block_size=K, num_heads=4, skip="none").to(device)
    read, found = prefill(base, ids), []
    slope = torch.linspace(0, 1, WIDTH, device=device)
    for packed in (True, False):
        carrier = net.compress(base, read, starts)
        if packed:
            hidden = read_carriers(base, read, starts, [carrier], K, H)[0]
        else:
            hidden = one_by_one(base, ids, starts, carrier.vectors, carrier.offset)
        (hidden.float().square() * slope).mean().backward()
        found.append((hidden.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])))
        net.zero_grad()
    for mine, theirs, near in zip(*found, NEAR[dtype], strict=True):
        assert error(mine, theirs) < near


@both
@torch.no_grad()
def test_keys_and_values_are_read_alike_in_one_group_and_in_several(device, dtype, monkeypatch):
    base, ids, starts = documents(device, dtype)
    read = prefill(base, ids, with_states=True)
    carrier, found = AvgPool(K).compress(base, read, starts), []
    for rows in (1, 4096):  # a branch alone, and all of them
        monkeypatch.setitem(packed_attention.ROWS_PER_GROUP, device, rows)
        found.append(read_carriers(base, read, starts, [carrier], K, H))
    assert error(*found) < NEAR[dtype][0]


@both
@pytest.mark.parametrize("objective", chunked_head.OBJECTIVES)
def test_scores_in_chunks_and_their_gradient_are_those_of_all_logits_at_once(device, dtype, objective, monkeypatch):
    base, ids, starts = documents(device, dtype)
    monkeypatch.setitem(chunked_head.CHUNK_ELEMENTS, device, 5 * base.vocab_size)  # 18 x H rows, 5 at a time
    known = rows_at(prefill(base, ids).hidden, starts + K - 1, H).flatten(0, 2)
    targets = blocks(ids, starts + K, H).flatten()
    students = (known + 0.3 * torch.randn_like(known))[None].requires_grad_()
    loss, numbers = chunked_head.score(base, students, known, targets, objective)
    (mine,) = torch.autograd.grad(loss.sum(), students)

    log_p, log_q = (F.log_softmax(base.logits(rows).float(), dim=-1) for rows in (known, students[0]))
    kl, nll, full = (
        (log_p.exp() * (log_p - log_q)).sum(-1),
        *(F.nll_loss(each, targets, reduction="none") for each in (log_q, log_p)),
    )
    expected = kl if objective == "kl" else nll - full
    (theirs,) = torch.autograd.grad(expected.sum(), students)
    near = NEAR[dtype][1]
    assert error(loss[0], expected) < near and error(mine, theirs) < near
    assert error(numbers["nll"][0], nll) < near and error(numbers["full"], full) < near
