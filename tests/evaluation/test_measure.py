"""Carriers and controls on the same blocks: each number is that of a plain forward over the changed document."""

import pytest
import torch
import torch.nn.functional as F

from megactx.evaluation.measure import _exchanged, measure
from megactx.gist import GistNet
from megactx.lm import BaseLM, masks

K, H, WIDTH = 8, 6, 32


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = dict(model_type="llama", vocab_size=97, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2)
    return BaseLM.from_config({**config, "num_attention_heads": 2, "max_position_embeddings": 256}).freeze()


def batches(count: int = 4) -> list[dict]:
    torch.manual_seed(1)
    return [
        {
            "ids": torch.randint(3, 97, (1, 64)),
            "lengths": torch.tensor([64]),
            "block_starts": torch.tensor([[8, 24, 48]]),
            "domain": ["code" if i % 2 else "narrative"],
            "document": torch.tensor([i]),
        }
        for i in range(count)
    ]


@torch.no_grad()
def test_every_row_of_the_table_equals_a_plain_forward_of_the_changed_document(base):
    net = GistNet(WIDTH, base.embedding_rms(), block_size=K, num_heads=4, skip="none", position="centre").eval()
    data = batches()
    scores = measure(base, {"gistnet": net}, data, H)
    assert len(scores) == 12 and scores.horizon == H

    def plain(ids, s, vector, at):
        embedded = base.embed(ids)
        middle = [vector[None, None]] if vector is not None else []
        x = torch.cat([embedded[:, :s], *middle, embedded[:, s + K : s + K + H - 1]], dim=1)
        positions = torch.cat(
            [torch.arange(s), torch.tensor([s + at] if middle else []).long(), torch.arange(s + K, s + K + H - 1)]
        )
        logits = base.model(
            inputs_embeds=x, position_ids=positions[None], attention_mask=masks.causal(x.shape[1])
        ).logits
        return F.cross_entropy(logits[0, -H:], ids[0, s + K : s + K + H], reduction="none")

    row = 0
    for batch in data:
        ids = batch["ids"]
        for s in batch["block_starts"][0].tolist():
            block = base.embed(ids[:, s : s + K])
            expected = {
                "gistnet": plain(ids, s, net.encode_block(block)[0], K // 2),
                "last token": plain(ids, s, block[0, -1], K - 1),
                "untrained mean (raw)": plain(ids, s, block[0].mean(0), K // 2),
            }
            for name, nll in expected.items():
                torch.testing.assert_close(scores.carriers[name][row], nll, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(scores.drop[row], plain(ids, s, None, 0), rtol=1e-4, atol=1e-5)
            logits = base.model(input_ids=ids).logits[0, s + K - 1 : s + K + H - 1]
            full = F.cross_entropy(logits, ids[0, s + K : s + K + H], reduction="none")
            torch.testing.assert_close(scores.full[row], full, rtol=1e-4, atol=1e-5)
            row += 1
    assert {"random gist", "another block's gist", "untrained mean (rescaled)"} <= set(scores.carriers)
    again = measure(base, {"gistnet": net}, data, H)
    assert all(torch.equal(again.carriers[name], values) for name, values in scores.carriers.items())
    assert scores.block_hash() == again.block_hash() != measure(base, {"gistnet": net}, data[1:], H).block_hash()


def test_another_blocks_gist_comes_from_another_text_of_the_same_domain():
    data = batches(6)
    gists = [torch.full((1, 3, 2), float(i)) for i in range(6)]
    for index, chosen in enumerate(_exchanged(data, gists, seed=0)):
        origins = set(chosen[..., 0].flatten().int().tolist())
        assert index not in origins and all(origin % 2 == index % 2 for origin in origins)


def test_a_lone_domain_takes_another_text_of_any_domain():
    data = batches(2)
    chosen = _exchanged(data, [torch.zeros(1, 3, 2), torch.ones(1, 3, 2)], seed=0)
    assert (chosen[0] == 1).all() and (chosen[1] == 0).all()
