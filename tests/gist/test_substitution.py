"""The packed pass equals the obvious loop: one full forward of the substituted document per block."""

import pytest
import torch
import torch.nn.functional as F
from small_base import WIDTH, small

from megactx.gist import GistNet
from megactx.gist.substitution import check_blocks, dropped, substituted
from megactx.lm import BaseLM, masks
from megactx.lm.chunked_head import score, score_exactly
from megactx.lm.gaussian_rope import spread
from megactx.lm.prefill import blocks, prefill, rows_at

K = 8


def gist_net(base: BaseLM, position: str, **settings) -> GistNet:
    torch.manual_seed(1)
    return GistNet(WIDTH, base.embedding_rms(), block_size=K, skip="none", position=position, **settings)


def loop(base, ids, starts, horizon, gist_of, offset, sigma=None):
    """Reference: (loss rows [B, N, H], NLL rows, teacher NLL rows) by one plain forward per block, no packing."""
    losses, nlls, fulls = [], [], []
    for b in range(len(ids)):
        with torch.no_grad():
            log_p = torch.log_softmax(base.model(input_ids=ids[b : b + 1]).logits[0], dim=-1)
        for s in starts[b].tolist():
            end = s + K + horizon
            target = ids[b, s + K : end]
            before, after = base.embed(ids[b, :s]), base.embed(ids[b, s + K : end - 1])
            gist = gist_of(base.embed(ids[b : b + 1, s : s + K]))
            positions = torch.cat([torch.arange(s), torch.arange(s + K, end - 1)])
            if gist is not None:
                before = torch.cat([before, gist])
                positions = torch.cat([positions[:s], torch.tensor([s + offset]), positions[s:]])
            x = torch.cat([before, after])[None]
            width = None if sigma is None else torch.where(torch.arange(x.shape[1]) == s, sigma, 0.0)[None]
            with spread(base.model.get_decoder(), width):
                out = base.model(
                    inputs_embeds=x,
                    position_ids=positions[None],
                    attention_mask=masks.causal(x.shape[1]),
                    use_cache=False,
                )
            log_q = torch.log_softmax(out.logits[0, -horizon:], dim=-1)
            p = log_p[s + K - 1 : end - 1]
            losses.append((p.exp() * (p - log_q)).sum(dim=-1))
            nlls.append(F.nll_loss(log_q, target, reduction="none"))
            fulls.append(F.nll_loss(p, target, reduction="none"))
    shape = (*starts.shape, horizon)
    return torch.stack(losses).view(shape), torch.stack(nlls).view(shape), torch.stack(fulls).view(shape)


def packed(base, ids, starts, horizon, vectors, offset, objective="kl", sigma=None):
    read = prefill(base, ids)
    hidden = substituted(base, read, starts, vectors, [offset] * len(vectors), K, horizon, [sigma] * len(vectors))
    return score(
        base,
        hidden.flatten(1, 3),
        rows_at(read.hidden, starts + K - 1, horizon).flatten(0, 2),
        blocks(ids, starts + K, horizon).flatten(),
        objective,
    )


@pytest.mark.parametrize("horizon", [1, 32, 64])
@pytest.mark.parametrize("kind", ["llama", "smollm3", "nanochat", "qwen3"])
@pytest.mark.parametrize("position", ["centre", "end"])
def test_loss_and_every_gistnet_gradient_equal_the_loop(kind, horizon, position):
    base = small(kind)
    net = gist_net(base, position)
    ids = torch.randint(3, 97, (2, 2 * K + 80 + horizon))
    last = (ids.shape[1] - K - horizon) // K * K
    starts = torch.tensor([[K, last, 40], [48, K, 16]])  # unsorted; the first eligible and the very last one
    ids = ids[:, : last + K + horizon]  # the last block's horizon ends with the document

    embedded = base.embed(blocks(ids, starts, K)).flatten(0, 1)
    loss, numbers = packed(base, ids, starts, horizon, net.encode_block(embedded).view(1, 2, 3, WIDTH), net.offset)
    loss.mean().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()

    plain, nll, full = loop(base, ids, starts, horizon, net.encode_block, net.offset)
    plain.mean().backward()
    torch.testing.assert_close(loss[0].view_as(plain), plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(numbers["nll"][0].view_as(nll), nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(numbers["full"].view_as(full), full, rtol=1e-4, atol=1e-5)
    for name, p in net.named_parameters():
        error = (gradients[name] - p.grad).norm() / p.grad.norm()
        assert error < 1e-4, f"gradient of {name} differs by {error:.1e}"


@pytest.mark.parametrize("mode", ["damped", "learned"])
@pytest.mark.parametrize("kind", ["llama", "smollm3", "nanochat", "qwen3"])
def test_with_gaussian_rope_loss_and_every_gradient_equal_the_loop_too(kind, mode):
    base, horizon = small(kind), 12
    net = gist_net(base, "end", gaussian_rope=mode)
    ids, starts = torch.randint(3, 97, (2, 90)), torch.tensor([[64, 8], [32, 40]])
    embedded = base.embed(blocks(ids, starts, K)).flatten(0, 1)
    vectors = net.encode_block(embedded).view(1, 2, 2, WIDTH)
    loss, _ = packed(base, ids, starts, horizon, vectors, net.offset, sigma=net.sigma(1))
    loss.mean().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    assert ("spread.log_scale" in gradients) == (mode == "learned")
    net.zero_grad()

    plain, _, _ = loop(base, ids, starts, horizon, net.encode_block, net.offset, net.sigma(1))
    plain.mean().backward()
    torch.testing.assert_close(loss[0].view_as(plain), plain, rtol=1e-4, atol=1e-6)
    for name, p in net.named_parameters():
        error = (gradients[name] - p.grad).norm() / p.grad.norm()
        assert error < 1e-4, f"gradient of {name} differs by {error:.1e}"
    undamped, _ = packed(base, ids, starts, horizon, vectors, net.offset)
    assert not torch.allclose(undamped, loss, rtol=1e-4), "the spread of the position changed nothing"


@torch.no_grad()
def test_a_carrier_whose_position_is_a_point_is_the_same_beside_one_whose_position_is_wide():
    base, horizon = small("llama"), 6
    ids, starts = torch.randint(3, 97, (1, 60)), torch.tensor([[16, 40]])
    vectors, read = torch.randn(2, 1, 2, WIDTH), prefill(base, ids)
    points = substituted(base, read, starts, vectors, [7, 7], K, horizon)
    mixed = substituted(base, read, starts, vectors, [7, 7], K, horizon, [None, torch.tensor(2.3)])
    assert torch.equal(points[0], mixed[0]) and not torch.allclose(points[1], mixed[1], rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "smollm3", "nanochat"])
def test_the_dropped_block_equals_the_loop_without_it(kind):
    base, horizon = small(kind), 12
    ids, starts = torch.randint(3, 97, (2, 90)), torch.tensor([[8, 64], [32, 40]])
    read = prefill(base, ids)
    hidden = dropped(base, read, starts, K, horizon)
    targets = blocks(ids, starts + K, horizon).flatten()
    _, numbers = score(base, hidden.flatten(0, 2)[None], hidden.flatten(0, 2), targets)
    _, nll, _ = loop(base, ids, starts, horizon, lambda block: None, 0)
    torch.testing.assert_close(numbers["nll"][0].view_as(nll), nll, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_true_tokens_block_in_place_of_the_gist_costs_nothing():
    """With K = 1 the last token as the gist is the uncompressed model: dNLL and KL are 0."""
    base, horizon = small("llama"), 6
    ids, starts = torch.randint(3, 97, (1, 30)), torch.tensor([[4, 9]])
    read = prefill(base, ids)
    hidden = substituted(base, read, starts, base.embed(ids.gather(1, starts))[None], [0], 1, horizon)
    same = rows_at(read.hidden, starts, horizon)
    torch.testing.assert_close(hidden[0], same, rtol=1e-4, atol=1e-5)


def test_delta_nll_has_the_gradient_of_cross_entropy():
    base, horizon = small("llama"), 5
    net = gist_net(base, "end")
    ids, starts = torch.randint(3, 97, (1, 60)), torch.tensor([[16, 40]])
    vectors = net.encode_block(base.embed(blocks(ids, starts, K)).flatten(0, 1)).view(1, 1, 2, WIDTH)
    loss, numbers = packed(base, ids, starts, horizon, vectors, net.offset, "delta_nll")
    torch.testing.assert_close(loss[0].detach(), numbers["nll"][0] - numbers["full"])
    loss.mean().backward()
    got = net.head.last.weight.grad.clone()
    net.zero_grad()
    _, nll, _ = loop(base, ids, starts, horizon, net.encode_block, net.offset)
    nll.mean().backward()
    torch.testing.assert_close(got, net.head.last.weight.grad, rtol=1e-4, atol=1e-7)


def test_branches_of_different_chunks_carriers_and_documents_do_not_touch_each_other(monkeypatch):
    base = small("llama")
    ids, starts = torch.randint(3, 97, (2, 120)), torch.tensor([[8, 16, 80, 96, 40], [96, 24, 32, 8, 8]])
    vectors = torch.randn(3, 2, 5, WIDTH) * base.embedding_rms()
    with torch.no_grad():
        whole = substituted(base, prefill(base, ids), starts, vectors, [4, 7, 4], K, 10)
        monkeypatch.setattr("megactx.lm.packed_attention.ROWS_PER_GROUP", {"cpu": 10})
        apart = substituted(base, prefill(base, ids), starts, vectors, [4, 7, 4], K, 10)
        torch.testing.assert_close(apart, whole, rtol=1e-4, atol=1e-5)
        alone = substituted(base, prefill(base, ids[1:]), starts[1:, 2:3], vectors[1:2, 1:, 2:3], [7], K, 10)
        torch.testing.assert_close(alone[0, 0, 0], whole[1, 1, 2], rtol=1e-4, atol=1e-5)
        changed = vectors.clone()
        changed[0, 0, 0] += 1
        other = substituted(base, prefill(base, ids), starts, changed, [4, 7, 4], K, 10)
    same = torch.isclose(whole, other, rtol=1e-4, atol=1e-5).flatten(3).all(-1)
    assert not same[0, 0, 0]
    same[0, 0, 0] = True
    assert same.all(), "a gist reached a branch that is not its own"


@torch.no_grad()
def test_padding_on_the_right_changes_nothing():
    base = small("llama")
    ids, starts = torch.randint(3, 97, (1, 50)), torch.tensor([[8, 24]])
    vectors = torch.randn(1, 1, 2, WIDTH)
    padded = F.pad(ids, (0, 30), value=5)
    one, other = (substituted(base, prefill(base, x), starts, vectors, [7], K, 12) for x in (ids, padded))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_base_gets_no_gradient_and_the_score_needs_a_frozen_head():
    base = small("llama")
    base.requires_grad_(True)
    hidden = torch.randn(1, 3, WIDTH, requires_grad=True)
    with pytest.raises(ValueError, match="LM head must be frozen"):
        score(base, hidden, hidden[0], torch.zeros(3, dtype=torch.long))


def test_scoring_in_chunks_equals_scoring_at_once(monkeypatch):
    base = small("nanochat")
    students, teacher = torch.randn(2, 50, WIDTH, requires_grad=True), torch.randn(50, WIDTH)
    targets = torch.randint(0, 97, (50,))
    results = []
    for elements in (2**21, 97 * 7):
        monkeypatch.setattr("megactx.lm.chunked_head.CHUNK_ELEMENTS", {"cpu": elements})
        loss, numbers = score(base, students, teacher, targets)
        (gradient,) = torch.autograd.grad((loss * torch.arange(50)).sum(), students)
        agree = score_exactly(base, students, teacher, targets)["agree"]
        results.append((loss.detach(), gradient, numbers["nll"], agree))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_report_scores_in_fp32_where_the_base_is_in_bf16():
    torch.manual_seed(0)
    base = small("llama").to(torch.bfloat16).freeze()
    students, teacher = torch.randn(1, 400, WIDTH), torch.randn(400, WIDTH)
    students, teacher = students.bfloat16(), teacher.bfloat16()
    targets = torch.randint(0, 97, (400,))
    with torch.autocast("cpu", torch.bfloat16):
        found = score_exactly(base, students, teacher, targets)
    exact = small("llama").freeze()
    exact.load_state_dict(base.state_dict())
    _, expected = score(exact, students.float(), teacher.float(), targets)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)
    assert base.model.dtype == torch.bfloat16


def test_two_best_tokens_that_are_equal_are_no_agreement_with_the_second():
    base = small("llama")
    head = base.model.get_output_embeddings().weight
    head.requires_grad_(False)
    hidden = torch.randn(1, 1, WIDTH)
    best = int(base.logits(hidden).argmax())
    second = best + 1 if best < 96 else best - 1
    teacher = hidden[0].clone()
    head[max(best, second)] = head[min(best, second)]  # now they tie, and the first of them is the answer
    numbers = score_exactly(base, hidden, teacher, torch.zeros(1, dtype=torch.long))
    assert numbers["agree"].all()
    head[max(best, second)] *= 1.01 if float((head[best] * teacher).sum()) > 0 else 0.99
    clear = score_exactly(base, torch.zeros(1, 1, WIDTH), teacher, torch.zeros(1, dtype=torch.long))
    assert not clear["agree"].any()  # all logits of the student are equal: every token was its best before


@pytest.mark.parametrize(
    ("start", "horizon"),
    [(0, 4), (12, 4), (96, 1), (88, 5), (8, 0)],
    ids=["sink", "off grid", "outside", "horizon", "h0"],
)
def test_a_block_that_is_not_eligible_is_refused(start, horizon):
    with pytest.raises(ValueError, match="not eligible|horizon.tokens=0"):
        check_blocks(torch.tensor([[8, start]]), torch.tensor([100]), K, horizon)


def test_the_last_eligible_block_is_accepted():
    check_blocks(torch.tensor([[88]]), torch.tensor([100]), K, 4)


def test_a_model_whose_attention_cannot_be_replaced_is_refused(monkeypatch):
    class Other:
        @staticmethod
        def get_interface(name, default):
            return lambda module, query, key, value, mask, **settings: (query.transpose(1, 2).contiguous(), None)

    base = small("llama")
    ids, starts = torch.randint(3, 97, (1, 40)), torch.tensor([[8]])
    read = prefill(base, ids)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.ALL_ATTENTION_FUNCTIONS", Other)
    with pytest.raises(ValueError, match="llama does not use transformers' attention interface"):
        substituted(base, read, starts, torch.zeros(1, 1, 1, WIDTH), [7], K, 4)
