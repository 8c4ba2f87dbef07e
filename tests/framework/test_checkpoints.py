import contextlib
import resource
import shutil
import signal

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from megactx.framework.callbacks.checkpoints import AtomicCheckpointIO, Best, Newest, RandomState, Record
from megactx.framework.callbacks.progress import Progress
from megactx.framework.callbacks.stopping import StopOnBadLoss, StopOnInterrupt
from megactx.framework.command_line import ended_in_order
from megactx.framework.errors import FAILED, Interrupted, RunFailed, verdict


class Net(lightning.LightningModule):
    """One weight and dropout, so that the random state matters; ``bad`` is the step of a NaN loss."""

    monitor = "val/loss"

    def __init__(self, bad: int = -1, adamw_lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(8, 1)
        self.losses, self.val = [], [3.0, 1.0, 2.0, 4.0]

    def training_step(self, batch, batch_index):
        loss = torch.nn.functional.dropout(self.layer(batch.float()), 0.5).pow(2).mean()
        self.losses.append(loss.item())
        self.log("train/loss", loss, prog_bar=True)
        return loss * (float("nan") if self.global_step == self.hparams.bad else 1.0)

    def validation_step(self, batch, batch_index):
        self.log("val/loss", self.val[self.global_step // 2 - 1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.adamw_lr)


class PressCtrlC(lightning.Callback):
    """At the start of a training batch, or of the validation behind a step."""

    def __init__(self, batch: int | None = None, validation: int | None = None, number: int = signal.SIGINT):
        self.batch, self.validation, self.number = batch, validation, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            signal.raise_signal(self.number)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == self.validation and batch_idx == 0:
            signal.raise_signal(self.number)


class StopAt(lightning.Callback):
    """Ends a run at a validation, as a plateau does."""

    def __init__(self, step: int):
        self.step = step

    def on_validation_end(self, trainer, pl_module):
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


def fit(folder, net, *callbacks, steps=8, resume=None, **settings):
    last = Newest(folder / "checkpoints", every_n_train_steps=2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=2 * settings.get("accumulate_grad_batches", 1),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(c, Progress) for c in callbacks),
        plugins=[AtomicCheckpointIO()],
        callbacks=[StopOnBadLoss(), RandomState(), *callbacks, last, StopOnInterrupt(folder)],
        default_root_dir=folder,
        **settings,
    )
    data = torch.linspace(-1, 1, 8).repeat(64, 1)  # every batch alike: what differs between steps is the dropout
    loaders = DataLoader(data, batch_size=2), DataLoader(data[:2])
    trainer.fit(net, *loaders, ckpt_path=resume, weights_only=True)
    return trainer


def load(path):
    return torch.load(path, weights_only=True)


@contextlib.contextmanager
def small_files():
    """No file may grow beyond 4 kB: writing fails as it does on a full disk.

    It holds for the whole process, so for the file that the tests' own output may go to: only around what must fail.
    """
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_while_saving_keeps_what_was_saved_and_names_the_setting(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.ones(4)}, path)
    with pytest.raises(RunFailed, match=r"the disk is full.*folder=") as error, small_files():
        AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(100_000)}, path)
    assert verdict(error.value)[0] == FAILED
    assert torch.equal(load(path)["x"], torch.ones(4))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFailed, match="could not be saved"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


def test_a_nan_loss_stops_before_the_step_and_names_learning_rate_and_last_checkpoint(tmp_path):
    net = Net(bad=5)
    with pytest.raises(RunFailed, match=r"step 5;.*stage.adamw_lr.*last.ckpt"):
        fit(tmp_path, net)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_ctrl_c_saves_after_the_whole_step_and_the_run_goes_on_to_the_same_weights(tmp_path):
    def start() -> Net:
        torch.manual_seed(0)
        return Net()

    straight = start()
    fit(tmp_path / "a", straight, accumulate_grad_batches=2)
    before = signal.getsignal(signal.SIGINT)
    first = start()
    with pytest.raises(Interrupted, match="step 3"):
        fit(tmp_path / "b", first, PressCtrlC(batch=4), accumulate_grad_batches=2)
    assert signal.getsignal(signal.SIGINT) is before
    assert first.losses == straight.losses[:6]  # the step that was under way was finished
    second = Net()
    torch.manual_seed(99)
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "b", second, resume=last, accumulate_grad_batches=2)
    assert second.losses == straight.losses[6:]
    assert torch.equal(second.layer.weight, straight.layer.weight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_inside_a_command_is_saved_where_the_command_is_ended(number, tmp_path):
    before = signal.signal(number, signal.SIG_DFL)  # these tests may be run by something that ignores it
    try:
        with pytest.raises(Interrupted, match="step 3"), ended_in_order():
            fit(tmp_path, Net(), PressCtrlC(batch=2, number=number))
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3


@pytest.mark.parametrize("when", [{"validation": 4}, {"batch": 7}], ids=["while validating", "in the step before"])
def test_ctrl_c_at_a_validation_finishes_it_and_the_run_goes_on_behind_it(when, tmp_path):
    straight, first, second = Net(), Net(), Net()
    second.load_state_dict(straight.state_dict())
    first.load_state_dict(straight.state_dict())
    torch.manual_seed(0)
    fit(tmp_path / "a", straight, Best(tmp_path / "a" / "checkpoints"), accumulate_grad_batches=2)
    torch.manual_seed(0)
    settings = dict(accumulate_grad_batches=2)
    with pytest.raises(Interrupted, match="step 4"):
        fit(tmp_path / "b", first, PressCtrlC(**when), Best(tmp_path / "b" / "checkpoints"), **settings)
    assert load(tmp_path / "b" / "checkpoints" / "best.ckpt")["global_step"] == 4  # the validation's new minimum
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "b", second, Best(tmp_path / "b" / "checkpoints"), resume=last, **settings)
    assert first.losses + second.losses == straight.losses
    assert torch.equal(second.layer.weight, straight.layer.weight)
    assert load(tmp_path / "b" / "checkpoints" / "best.ckpt")["global_step"] == 4  # later ones are worse, and it knows


def test_a_run_that_ended_itself_does_not_train_on_when_resumed_but_another_run_does_from_there(tmp_path):
    def again(folder, resume=None, *callbacks):
        net = Net()
        fit(folder, net, *callbacks, Record({"folder": str(folder)}), resume=resume)
        return len(net.losses)

    assert again(tmp_path / "a", None, StopAt(4)) == 4
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    assert load(last)["ended"] is True and load(last)["global_step"] == 4
    assert again(tmp_path / "a", last) == 0
    assert again(tmp_path / "b", last) == 4


def test_best_is_the_checkpoint_of_the_lowest_monitored_value(tmp_path):
    fit(tmp_path, Net(), Best(tmp_path / "checkpoints"))
    assert load(tmp_path / "checkpoints" / "best.ckpt")["global_step"] == 4


def test_a_stage_without_a_monitor_has_no_best(tmp_path):
    net = Net()
    net.monitor = None
    fit(tmp_path, net, Best(tmp_path / "checkpoints"))
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_without_a_terminal_progress_is_a_line_every_few_percent_with_the_metrics(tmp_path, capsys):
    fit(tmp_path, Net(), Progress(every=50))
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 4/8 (50 %)", "step 8/8 (100 %)"]
    assert "train/loss" in lines[0]


def test_in_a_terminal_progress_is_a_bar(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fit(tmp_path, Net(), Progress())
    assert "8/8" in capsys.readouterr().out


@pytest.mark.slow
def test_averaged_weights_are_saved_beside_those_that_go_on_and_no_frozen_base_with_either(
    gist_settings, tmp_path, monkeypatch
):
    from megactx.framework.app import run

    average = "+callbacks.average={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.5}"
    rest = [average, "stage.evaluate={blocks: 8, copies: 0, controls: false}", "preset.steps=2", "stage.lr=0.05"]
    assert run([*gist_settings, *rest, f"folder={tmp_path / 'a'}"]) == 0
    saved = torch.load(tmp_path / "a" / "checkpoints" / "last.ckpt", weights_only=True)
    running, averaged = saved["current_model_state"], saved["state_dict"]
    assert running.keys() == averaged.keys() and not any(name.startswith("base.") for name in running)
    assert any(not torch.equal(running[name], averaged[name]) for name in running)
    before = torch.load(tmp_path / "a" / "checkpoints" / "step_000002.ckpt", weights_only=True)["current_model_state"]
    assert all(torch.equal(running[name], before[name]) for name in running)
    longer = [override.replace("preset.steps=2", "preset.steps=3") for override in rest]
    assert run([*gist_settings, *longer, f"folder={tmp_path / 'a'}", "resume=auto"]) == 0


def test_where_steps_take_long_there_is_a_checkpoint_between_the_due_ones(tmp_path, monkeypatch):
    from megactx.framework.callbacks import checkpoints

    class Seen(lightning.Callback):
        def __init__(self):
            self.there = []

        def on_train_batch_start(self, trainer, *rest):
            self.there.append((tmp_path / "checkpoints" / "last.ckpt").exists())

    for latest, there in ((1e9, [False, False, True]), (-1.0, [False, True, True])):  # due every two steps
        monkeypatch.setattr(checkpoints, "LATEST", latest)
        seen = Seen()
        fit(tmp_path, Net(), seen)
        assert seen.there[:3] == there
        shutil.rmtree(tmp_path / "checkpoints")


def test_without_a_terminal_a_line_at_a_validation_shows_what_that_validation_found(tmp_path, capsys):
    class Shown(Net):
        def validation_step(self, batch, batch_index):
            self.log("val/loss", self.val[self.global_step // 2 - 1], prog_bar=True)

    fit(tmp_path, Shown(), Progress(every=25))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.partition(" ")[2].partition("/")[0] for line in lines] == ["2", "4", "6", "8"]
    assert [f"val/loss {value:.3f}" in line for line, value in zip(lines, Shown().val, strict=True)] == [True] * 4
