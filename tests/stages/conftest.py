"""The joint stages in miniature."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KILLED, REPOSITORY = Path(__file__).with_name("killed.py"), Path(__file__).parents[2]


@pytest.fixture(scope="session")
def killed():
    """Run ``killed.py`` with its arguments in a process of its own; -> the process, which is done."""

    def start(*arguments) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, str(KILLED), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return start


@pytest.fixture
def dies_at(monkeypatch):
    """At the ``time``-th call of a method the power is gone, once."""

    def arm(kind, method: str, time: int) -> None:
        original, count = getattr(kind, method), []

        @functools.wraps(original)  # Lightning passes what the signature names
        def wrapped(self, *arguments):
            count.append(1)
            if len(count) == time:
                monkeypatch.setattr(kind, method, original)
                raise RuntimeError("the power is gone")
            return original(self, *arguments)

        monkeypatch.setattr(kind, method, wrapped)

    return arm


@pytest.fixture(scope="session")
def joint_settings(base_folder, texts, tmp_path_factory):
    """Overrides of a short run of a joint stage; a test adds ``experiment=...`` and ``folder=...``."""
    from megactx.gist import GistNet
    from megactx.lm import BaseLM
    from megactx.parts.write import save_gistnet

    base = BaseLM.from_pretrained(str(base_folder)).freeze()
    torch.manual_seed(3)
    given = {"block_size": 8, "num_heads": 4, "dropout": 0.1}  # dropout draws random numbers
    net, folder = GistNet(32, base.embedding_rms(), **given), tmp_path_factory.mktemp("gistnet")
    save_gistnet(net, given, base, folder / "net")
    return [
        *["preset=demo", "data=files", f"data.path={texts}", f"base.name={base_folder}"],
        *[
            f"stage.gistnet={folder / 'net'}",
            "stage.lens=null",
            "data.weights={narrative: 0.5, code: 0.5, structured: 0}",
        ],
        *["block_size=8", "horizon.tokens=8", "lensnet.num_heads=4", "lensnet.dropout=0.1", "preset.warmup=1"],
        *["datamodule.min_tokens=300", "datamodule.max_tokens=400", "datamodule.batch=2", "datamodule.documents=2"],
        *["datamodule.validation_windows=3", "stage.budgets=[0.6, 0.7]", "stage.evaluate.documents=3"],
        *["stage.evaluate.tokens=300", "stage.evaluate.budgets=[0.6]", "stage.lora.rank=4"],
        *["trainer=cpu", "trainer.precision=32-true", "trainer.log_every_n_steps=1"],
    ]
