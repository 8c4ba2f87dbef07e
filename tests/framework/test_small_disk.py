"""On a real disk that is full, or that may not be written: what was saved last is whole, and one message says where."""

import pytest
import torch
from torch import nn

from megactx.framework.app import run
from megactx.framework.errors import FAILED, MISTAKE, RunFailed, verdict
from megactx.framework.files import PART
from megactx.gist import GistNet
from megactx.memory import MegaContextTree


def left(place):
    return [path for path in place.rglob("*") if path.name.startswith(PART) or path.suffix == ".part"]


def tree_of(tokens):
    torch.manual_seed(0)
    encoder = GistNet(256, 1.0, block_size=4, type="mean", head="linear", skip="none").eval()
    table = nn.Embedding(500, 256)
    return encoder, table, MegaContextTree.from_tokens(torch.randint(0, 500, (1, tokens)), encoder, table)


def test_a_tree_that_does_not_fit_on_its_disk_leaves_the_one_before_whole(disk):
    place = disk("12m")
    encoder, table, tree = tree_of(8_000)
    tree.save(place / "tree")
    tree.append(torch.randint(0, 500, (1, 40_000)))
    for _ in range(3):
        with pytest.raises(RunFailed, match=f"{place / 'tree'} could not be written: .*full.* another place") as found:
            tree.save(place / "tree")
        assert verdict(found.value)[0] == FAILED
    assert MegaContextTree.load(place / "tree", encoder, table).lengths.tolist() == [8_000]
    there = sorted(path.suffix for path in (place / "tree").iterdir() if not path.name.endswith(("-wal", "-shm")))
    assert there == [".db", ".json"] and not left(place)


def test_a_tree_on_a_disk_that_may_not_be_written_is_a_mistake(disk):
    place = disk(read_only=True)
    with pytest.raises(ValueError, match=f"{place}.* cannot be written .*Read-only.*another place") as found:
        tree_of(40)[2].save(place / "tree")
    assert verdict(found.value)[0] == MISTAKE


def test_a_run_that_fills_its_disk_fails_with_one_message_and_keeps_its_last_checkpoint(tiny_run, disk, capfd):
    place = disk("2500k")
    code = run(
        [
            *tiny_run,
            f"folder={place / 'run'}",
            "callbacks.checkpoint.save_top_k=-1",
            "preset.steps=40",
            "trainer.log_every_n_steps=20",
        ]
    )
    err = capfd.readouterr().err
    assert code == FAILED and err.count("megactx: ") == 1 and "folder=" in err and "Traceback" not in err
    assert str(place / "run") in err  # where
    saved = place / "run" / "checkpoints" / "last.ckpt"
    step = torch.load(saved, weights_only=True)["global_step"]
    assert step >= 2
    assert not left(place)


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_run_folder_that_cannot_be_written_is_told_with_its_setting(tiny_run, disk, capfd, kind):
    place = disk("8k", read_only=kind == "read-only")
    if kind == "full":
        (place / "other").write_bytes(b"x" * 4096)
    code = run([*tiny_run, f"folder={place / 'run'}"])
    err = capfd.readouterr().err
    assert code == (FAILED if kind == "full" else MISTAKE)
    assert err.count("megactx: ") == 1 and "folder=" in err and str(place) in err and "Traceback" not in err


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_cache_that_is_full_or_cannot_be_written_names_its_variable(
    tiny_run, disk, tmp_path, monkeypatch, capfd, kind
):
    place = disk("8k", read_only=kind == "read-only")
    monkeypatch.setenv("MEGACTX_CACHE", str(place / "cache"))
    code = run([*tiny_run, f"folder={tmp_path / 'run'}"])
    err = capfd.readouterr().err
    assert code == (FAILED if kind == "full" else MISTAKE)
    assert err.count("megactx: ") == 1 and "MEGACTX_CACHE" in err and str(place) in err
    assert "Traceback (" not in err and not left(place)
