"""A GistNet has one name, on every machine."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.memory import MegaContextTree, encoding

ASKED = """
import torch
from megactx.memory.encoding import identity
from megactx.runtime import load_models

models = load_models()
print(torch.get_num_threads(), models.base.embedding_rms(), identity(models.gistnet))
"""


@pytest.fixture(scope="module")
def base():
    return BaseLM.from_pretrained("asset:tiny-base", "float32").freeze()


def net_of(base, scale: float):
    torch.manual_seed(3)
    return GistNet(base.width, scale, block_size=32, num_heads=4).eval().requires_grad_(False)


@pytest.mark.slow
def test_the_name_of_a_gistnet_does_not_depend_on_the_number_of_threads():
    said = []
    for threads in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", ASKED], env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True
        )
        count, *rest = done.stdout.split()
        assert count == threads
        said.append(rest)
    assert said[0] == said[1]


def test_the_scale_is_that_of_a_sum_in_fp64(base):
    table = base.embeddings().numpy().astype(np.float64)
    assert base.embedding_rms() == float(np.float32(np.sqrt((table**2).mean())))


def test_a_tree_that_was_saved_under_the_name_of_a_sum_in_fp32_opens_and_one_of_another_scale_does_not(base, tmp_path):
    scale, ids = np.float32(base.embedding_rms()), torch.arange(5, 205)[None]
    for ulps in (-3, 1):  # as builds of earlier days have called the same net, by threads
        earlier = net_of(base, float(scale + ulps * np.spacing(scale)))
        folder = tmp_path / f"tree{ulps}"
        MegaContextTree.from_tokens(ids, earlier, base).save(folder)
        now = net_of(base, float(scale))
        assert encoding.identity(now) != encoding.identity(earlier)
        tree = MegaContextTree.load(folder, now, base)
        assert tree.versions[tree.version] == encoding.identity(now)
        tree.append(ids)
        tree.save(folder)  # and from now on it has the right name
        assert not encoding.known_as(net_of(base, 2.0), tree.versions[tree.version])
        assert MegaContextTree.load(folder, now, base).versions == [encoding.identity(now)]
    MegaContextTree.from_tokens(ids, net_of(base, float(scale) * 1.0001), base).save(tmp_path / "other")
    with pytest.raises(ValueError, match="another GistNet made it"):
        MegaContextTree.load(tmp_path / "other", net_of(base, float(scale)), base)


def test_what_has_no_scale_is_known_by_its_identity_alone():
    net = nn.Linear(2, 2)
    assert encoding.known_as(net, encoding.identity(net))
    assert not encoding.known_as(net, hashlib.sha256(b"other").hexdigest()[:16])
