import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader

from megactx.framework.callbacks.monitor import GradientNorm, LearningRate, Summary, describe
from megactx.framework.callbacks.throughput import Throughput
from megactx.framework.optimizers import MuonWithAdamW


class Rows(Logger):
    """Keeps what a logger is given."""

    def __init__(self):
        self.rows = []

    name = version = "rows"

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})

    def log_hyperparams(self, *args, **kwargs):
        pass


class Net(lightning.LightningModule):
    """Two nets and a frozen base; dropout, so that the random state matters."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.nets = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 1)})
        self.norms = []

    def amounts(self, batch):
        return {}

    def training_step(self, batch, batch_index):
        x = nn.functional.dropout(self.base(batch["ids"].float()), 0.5)
        return self.nets["two"](self.nets["one"](x)).pow(2).mean()

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(
            [torch.cat([p.grad.flatten() for p in net.parameters()]).norm() for net in self.nets.values()]
        )

    def configure_optimizers(self):
        matrices = [p for p in self.nets.parameters() if p.ndim == 2]
        others = [p for p in self.nets.parameters() if p.ndim == 1]
        optimizer = MuonWithAdamW(
            [
                {"params": matrices, "lr": 0.1, "weight_decay": 0.0, "muon": True},
                {"params": others, "lr": 0.01, "weight_decay": 0.0},
            ]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(*callbacks, steps=4, logger=True, **settings):
    torch.manual_seed(0)
    stage, rows = Net(), Rows()
    data = [{"ids": torch.arange(8).view(2, 4) + i} for i in range(32)]
    settings = {"log_every_n_steps": 1, **settings}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=rows if logger else False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(stage, DataLoader(data, batch_size=None))
    return stage, rows.rows


def test_the_gradient_norm_of_every_net_is_the_one_before_clipping():
    stage, rows = fit(GradientNorm(), gradient_clip_val=1e-3)
    seen = [row[f"grad_norm/{name}"] for row in rows for name in ("one", "two")]
    assert seen == pytest.approx([float(norm) for norms in stage.norms for norm in norms])
    assert min(seen) > 1e-3
    assert not any("base" in name for row in rows for name in row)


def test_the_learning_rates_are_those_of_the_step_by_optimizer():
    _, rows = fit(LearningRate())
    assert [row["lr/muon"] for row in rows] == pytest.approx([0.1, 0.05, 0.1 / 3, 0.025])
    assert [row["lr/adamw"] for row in rows] == pytest.approx([0.01, 0.005, 0.01 / 3, 0.0025])


def test_groups_of_one_optimizer_are_told_apart(monkeypatch):
    def groups(self):
        return torch.optim.AdamW(
            [{"params": net.parameters(), "lr": lr} for net, lr in zip(self.nets.values(), (1e-3, 2e-3), strict=True)]
        )

    monkeypatch.setattr(Net, "configure_optimizers", groups)
    _, rows = fit(LearningRate(), steps=1)
    assert (rows[0]["lr/adamw"], rows[0]["lr/adamw_2"]) == pytest.approx((1e-3, 2e-3))


def test_an_accumulated_step_is_one_row_and_steps_between_are_none():
    _, rows = fit(GradientNorm(), LearningRate(), steps=4, accumulate_grad_batches=3, log_every_n_steps=2)
    assert [row["step"] for row in rows] == [1, 3]
    assert all({"grad_norm/one", "lr/muon"} <= row.keys() for row in rows)


def test_nothing_is_logged_where_no_step_is():
    _, rows = fit(GradientNorm(), LearningRate(), Throughput(), steps=2, log_every_n_steps=0)
    assert rows == []


def test_watching_changes_neither_the_weights_nor_the_random_numbers_and_needs_no_logger():
    plain, _ = fit(logger=False)
    state = torch.get_rng_state()
    watched, _ = fit(GradientNorm(), LearningRate(), Throughput(), Summary(), logger=False)
    assert torch.equal(torch.get_rng_state(), state)
    for mine, theirs in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_summary_tells_once_what_trains_and_what_is_frozen(caplog):
    caplog.set_level("INFO", logger="megactx")
    fit(Summary(), steps=2)
    told = [record.getMessage() for record in caplog.records if "train" in record.getMessage()]
    assert told == ["Parameters that train: one 20, two 5; frozen: base 20"]


def test_the_summary_tells_how_much_of_a_part_trains():
    stage = Net()
    stage.base.bias.requires_grad_(True)
    assert describe(stage) == "Parameters that train: base 4 of its 20, one 20, two 5; frozen: none"
    assert describe(Net().requires_grad_(False)) == "Parameters that train: none; frozen: base 20, one 20, two 5"
