import logging
from types import SimpleNamespace

import pytest
import torch

from megactx.framework.callbacks.early_stopping import ValidationProtocol


def run(values, window=1000, every=100, warmup=0):
    """The step at which the stage ends, and why; (None, "") where it does not."""
    protocol = ValidationProtocol(window, warmup)
    for index, value in enumerate(values, start=1):
        if reason := protocol.add(index * every, value):
            return index * every, reason
    return None, ""


def test_a_stage_that_goes_on_improving_does_not_end():
    assert run([0.9**i for i in range(60)]) == (None, "")


def test_less_than_5_percent_over_the_window_ends_it_and_not_before_the_window_is_full():
    step, reason = run([1.0 - 0.0001 * i for i in range(60)], window=500)
    assert step == 600 and "less than 5%" in reason  # the first with another one 500 steps before it
    assert run([1.0 - 0.0001 * i for i in range(5)], window=500) == (None, "")


def test_just_5_percent_over_the_window_is_enough_to_go_on():
    assert run([1.0, 0.975, 0.95, 0.926, 0.902], window=200) == (None, "")
    assert run([1.0, 0.975, 0.951], window=200)[0] == 300


def test_a_plateau_needs_three_validations_however_short_the_window():
    assert run([1.0, 1.0 - 1e-6], window=100) == (None, "")
    assert run([1.0, 1.0 - 1e-6, 1.0 - 2e-6], window=100)[0] == 300


def test_the_best_so_far_counts_not_the_newest():
    # The newest is a spike; the best one improved by 10 % within the window.
    assert run([1.0, 0.9, 0.99], window=200) == (None, "")


def test_three_validations_in_a_row_above_their_moving_average_end_it():
    step, reason = run([1.0, 0.5, 0.96, 0.97, 0.98], window=10_000)
    assert step == 500 and "3 validations in a row" in reason
    assert run([1.0, 0.5, 0.96, 0.97, 0.5, 0.98, 0.98], window=10_000) == (None, "")


def test_the_moving_average_is_updated_after_comparing():
    protocol = ValidationProtocol(10_000, 0)
    average = None
    for step, value in enumerate([1.0, 0.7, 0.9, 0.8, 0.2], start=1):
        protocol.add(step, value)
        average = value if average is None else 2 / 11 * value + 9 / 11 * average
        assert protocol.ema == pytest.approx(average)


def test_a_value_that_is_no_number_counts_as_worse():
    assert run([1.0, float("nan"), float("nan"), float("nan")], window=10_000)[0] == 400


def test_its_state_goes_on_exactly():
    values = [1.0, 0.8, 0.85, 0.9, 0.7, 0.9, 0.95, 0.99]
    whole, first = ValidationProtocol(300, 0), ValidationProtocol(300, 0)
    reasons = [whole.add(100 * i, v) for i, v in enumerate(values)]
    assert [first.add(100 * i, v) for i, v in enumerate(values[:4])] == reasons[:4]
    second = ValidationProtocol(300, 0)
    second.load_state_dict(first.state_dict())
    assert [second.add(100 * (4 + i), v) for i, v in enumerate(values[4:])] == reasons[4:]
    assert second.state_dict() == whole.state_dict()


def trainer(step, **values):
    metrics = {name: torch.tensor(value) for name, value in values.items()}
    return SimpleNamespace(
        global_step=step, callback_metrics=metrics, sanity_checking=False, should_stop=False, loggers=[]
    )


STAGE = SimpleNamespace(monitor="val/dnll", loss_settings=lambda name: {"weight": 0.05})


def test_validations_of_the_warm_up_and_repeated_ones_do_not_count():
    protocol = ValidationProtocol(100, warmup=150)
    for step in (100, 200, 200, 300):
        protocol.on_validation_end(trainer(step, **{"val/dnll": 1.0}), STAGE)
    assert protocol.steps == [200, 300]


def test_a_plateau_stops_the_trainer():
    protocol, stopped = ValidationProtocol(100, warmup=0), []
    for step in (100, 200, 300):
        now = trainer(step, **{"val/dnll": 1.0})
        protocol.on_validation_end(now, STAGE)
        stopped.append(now.should_stop)
    assert stopped == [False, False, True]


@pytest.mark.parametrize(
    "values, said",
    [
        ({"val/diversity": 0.2}, "collapse"),
        ({"val/cosine_std": 0.05}, "contrastive.weight (lambda, now 0.05)"),
        ({"val/ppl_ratio": 2.5}, "above 2"),
    ],
)
def test_collapse_is_told_with_the_setting_to_change(values, said, caplog):
    with caplog.at_level(logging.WARNING):
        ValidationProtocol(100, 0).on_validation_end(trainer(100, **{"val/dnll": 1.0}, **values), STAGE)
    assert said in caplog.text


def test_healthy_gists_raise_no_alarm(caplog):
    healthy = {"val/dnll": 1.0, "val/diversity": 0.6, "val/cosine_std": 0.2, "val/ppl_ratio": 1.4}
    with caplog.at_level(logging.WARNING):
        ValidationProtocol(100, 0).on_validation_end(trainer(100, **healthy), STAGE)
    assert not caplog.records


def test_a_window_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="preset.plateau_window=0"):
        ValidationProtocol(0, 0)
