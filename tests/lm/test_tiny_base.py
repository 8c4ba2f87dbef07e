"""The embedded base model: small enough to ship, and it uses its context."""

from pathlib import Path

import pytest
import torch

from megactx.assets import resolve
from megactx.lm import BaseLM, masks


@pytest.fixture(scope="module")
def base():
    return BaseLM.from_pretrained("asset:tiny-base", "float32").freeze()


def test_the_folder_is_complete_and_at_most_20_mb():
    folder = Path(resolve("asset:tiny-base"))
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors", "README.md"} <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in folder.iterdir())


def test_it_has_the_promised_shape(base):
    assert base.width == 64 * base.config.num_hidden_layers and base.width % 8 == 0
    assert 5e6 <= sum(p.numel() for p in base.parameters()) <= 9e6
    assert base.vocab_size == len(base.tokenizer) == 8192 and base.max_positions >= 4096


@pytest.mark.slow
@torch.no_grad()
def test_a_passage_of_code_is_cheaper_the_second_time(base):
    source = Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8")
    ids = torch.tensor(base.tokenizer(source)["input_ids"])
    gains = []
    for start in range(0, 20_000, 2000):
        passage, between, other = (
            ids[start : start + 256],
            ids[start + 256 : start + 384],
            ids[start + 900 : start + 1156],
        )
        nll = []
        for first in (passage, other):
            x = torch.cat([torch.tensor([0]), first, between, passage])[None]
            hidden = base(base.embed(x), torch.arange(x.shape[1])[None], masks.causal(x.shape[1]))
            logits = base.logits(hidden[0, -257:-1])
            nll.append(torch.nn.functional.cross_entropy(logits, passage))
        gains.append(nll[1] - nll[0])
    assert torch.stack(gains).mean() > 0.3
