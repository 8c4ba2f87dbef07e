import errno

import pytest
import torch
from hydra.errors import InstantiationException

from megactx.framework.app import run
from megactx.framework.errors import FAILED, MISTAKE, RunFailed, closest, verdict


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("data.path=x: no such file"), MISTAKE, "data.path=x: no such file"),
        (RunFailed("the loss is NaN"), FAILED, "the loss is NaN"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), FAILED, "preset.batch"),
        (MemoryError(), FAILED, "preset.batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), FAILED, "preset.batch"),
        (OSError(errno.ENOSPC, "No space left on device"), FAILED, "folder="),
        (KeyError("x"), FAILED, "KeyError"),
    ],
)
def test_an_error_has_its_code_and_names_the_setting(error, code, said):
    got, message = verdict(error)
    assert got == code and said in message


def test_what_hydra_wraps_is_unwrapped():
    try:
        try:
            raise ValueError("gistnet.head=x")
        except ValueError as error:
            raise InstantiationException("Error in call to target") from error
    except InstantiationException as error:
        assert verdict(error) == (MISTAKE, "gistnet.head=x")


def test_a_misspelt_setting_is_found_among_its_neighbours_first():
    known = ["gistnet", "gistnet.head", "gistnet.num_heads", "horizon", "horizon.tokens", "stage.lr"]
    assert closest("gistnet.haed", known) == ["gistnet.head"]
    assert closest("lr", known) == ["stage.lr"]
    assert closest("nothing.like", known) == []


@pytest.mark.parametrize(
    ("was", "now"),
    [("stage.history.recall=0.1", "loss.recall.weight"), ("stage.level2_weight=1", "loss.level2.weight")],
)
def test_a_setting_under_its_name_of_before_says_the_new_one(was, now, capsys):
    assert run(["experiment=demo", was]) == MISTAKE
    assert f"{was.partition('=')[0]}: it is now {now}" in capsys.readouterr().err
