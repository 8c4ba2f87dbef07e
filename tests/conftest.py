"""What every room's tests share: a cache of their own, and a tokenizer that trains in a second."""

import os
import sysconfig
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Caches of this session only: a test never reads what another run has written."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("MEGACTX_CACHE")
    os.environ["MEGACTX_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["MEGACTX_CACHE"]
    else:
        os.environ["MEGACTX_CACHE"] = before


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """512 ids, trained on a few modules of the standard library."""
    from megactx.data.tokenizer import train_tokenizer

    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text(encoding="utf-8") for name in ("argparse.py", "ast.py", "textwrap.py")]
    return train_tokenizer(texts, vocab_size=512, progress=False)
