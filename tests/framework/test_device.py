import pytest
import torch

from megactx.framework.config.search_path import compose
from megactx.framework.run.device import choose, cpu_bf16_units

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@no_cuda
def test_auto_on_a_machine_without_cuda_is_the_cpu_in_bf16_where_it_has_bf16_units():
    device = choose("auto", "auto")
    assert device.accelerator == "cpu"
    assert device.precision == ("bf16-mixed" if cpu_bf16_units() else "32-true")
    assert "no CUDA here" in device.why


def test_a_precision_that_is_set_is_kept():
    assert choose("cpu", "32-true").precision == "32-true"


@no_cuda
@pytest.mark.parametrize("choice", ["cuda_bf16", "l4", "a100", "fsdp"])
def test_a_cuda_trainer_on_a_machine_without_cuda_is_refused_by_name(choice):
    trainer = compose([f"trainer={choice}"]).trainer
    with pytest.raises(ValueError, match=f"trainer={choice}.*trainer=auto"):
        choose(trainer.accelerator, trainer.precision, trainer.devices, choice)


@pytest.mark.parametrize(("devices", "accelerator"), [(0, "cpu"), (-1, "cpu"), ("two", "cpu"), (1, "tpu")])
def test_what_a_run_cannot_use_is_refused(devices, accelerator):
    with pytest.raises(ValueError, match="trainer.(devices|accelerator)="):
        choose(accelerator, "auto", devices)


def test_every_trainer_sees_as_many_documents_per_step_as_the_full_preset_says():
    for choice in ("auto", "cpu", "cuda_bf16", "l4", "a100"):
        preset = compose([f"trainer={choice}"]).preset
        assert preset.batch * preset.accumulate == 32


@pytest.mark.parametrize(("devices", "count"), [(1, 1), ("3", 3), ("auto", 1)])
def test_the_number_of_processes_is_said(devices, count):
    device = choose("cpu", "auto", devices)
    assert device.count == count and (f"{count} processes" in device.why) == (count > 1)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork_find_unused_parameters_true", "ddp_notebook"])
def test_a_strategy_that_starts_processes_from_inside_is_refused(strategy):
    with pytest.raises(ValueError, match=f"trainer.strategy={strategy}.*trainer=ddp"):
        choose("cpu", "auto", 2, strategy=strategy)
