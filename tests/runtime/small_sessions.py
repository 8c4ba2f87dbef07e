"""A base LM with a tokenizer, a GistNet of blocks of 4 and a LensNet with opinions, all small and random."""

import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from byte_fallback import KINDS, byte_fallback

from megactx.focus import LensNet
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.memory.prediction import Readout
from megactx.parts.write import save_gistnet, save_lensnet
from megactx.runtime import Controller, Models, Settings

K = 4
GISTNET = dict(block_size=K, num_heads=4, skip="none")
LENSNET = dict(layers=1, num_heads=4)
SMALL = dict(budget=96, allocator={"protected": 8})


@pytest.fixture(scope="session")
def make_models(base_folder):
    """settings of the GistNet -> models; the base takes 512 positions."""

    def make(seed=0, **settings):
        base = BaseLM.from_pretrained(str(base_folder), "float32").freeze()
        torch.manual_seed(seed)
        gistnet = GistNet(base.width, base.embedding_rms(), **GISTNET | settings).eval().requires_grad_(False)
        lensnet = LensNet(base.width, K, **LENSNET).eval().requires_grad_(False)
        torch.nn.init.normal_(lensnet.last.weight, std=0.05)
        torch.nn.init.constant_(lensnet.last.bias, 0.2)  # detail is worth something nearly everywhere
        return Models(base, gistnet, lensnet, "small")

    return make


@pytest.fixture(scope="session")
def models(make_models):
    return make_models()


@pytest.fixture(scope="session")
def foretelling_models(models):
    """The same with a readout that was never trained."""
    torch.manual_seed(5)
    return replace(models, prediction=Readout(models.base.width).eval().requires_grad_(False))


@pytest.fixture(scope="session")
def exported(models, tmp_path_factory):
    """A folder that the commands take."""
    folder = tmp_path_factory.mktemp("exported") / "models"
    models.base.model.save_pretrained(folder)
    models.base.tokenizer.save_pretrained(folder)
    save_gistnet(models.gistnet, GISTNET, models.base, folder / "gistnet")
    save_lensnet(models.lensnet, LENSNET, models.gistnet, folder / "lensnet")
    return folder


def making(models):
    """kind -> a controller with a window of 96 entries."""

    def make(megacontext="focus", **settings):
        return Controller(models, Settings(**SMALL | {"megacontext": megacontext} | settings))

    return make


@pytest.fixture
def controller(models):
    """``making`` of the small models."""
    return making(models)


@pytest.fixture
def foretelling(foretelling_models):
    """``making`` of those with a readout."""
    return making(foretelling_models)


@pytest.fixture(scope="session")
def ids():
    """[rows, T] -> random ids, without the two special ones."""

    def make(*shape, seed=0):
        return torch.randint(2, 512, shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def byte_tokenizers(tiny_tokenizer):
    """kind -> a tokenizer with byte fallback."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text(encoding="utf-8") for name in ("argparse.py", "ast.py", "textwrap.py")]
    return {kind: byte_fallback(kind, texts) for kind in KINDS}


@pytest.fixture(scope="session")
def byte_models(byte_tokenizers):
    """kind -> models whose base LM reads by such a tokenizer; without a LensNet."""

    def make(kind):
        tokenizer = byte_tokenizers[kind]
        config = dict(model_type="llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64)
        config |= dict(num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=512, bos_token_id=None)
        torch.manual_seed(0)
        base = BaseLM.from_config(config | {"eos_token_id": None}, tokenizer).freeze()
        gistnet = GistNet(base.width, base.embedding_rms(), **GISTNET).eval().requires_grad_(False)
        return Models(base, gistnet, None, kind)

    return make
