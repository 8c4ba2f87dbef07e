from types import SimpleNamespace

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from megactx.framework.app import run
from megactx.framework.config.search_path import VERSION_BASE, compose, register, root
from megactx.framework.sweep.grids import Grids


def jobs(grids, overrides=(), at_once=None) -> list[list[list[str]]]:
    """The chunks of jobs that the sweeper would hand to a launcher."""
    register()
    with hydra.initialize_config_dir(str(root("configs")), version_base=VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()
        sweeper = Grids(grids=grids)
        sweeper.hydra_context = SimpleNamespace(config_loader=loader)
        return sweeper.split_arguments(OverridesParser.create(loader).parse_overrides(list(overrides)), at_once)


def test_jobs_are_the_union_of_the_grids():
    (found,) = jobs([{"pooling": "mean,cls", "depth": "d1,d2"}, {"gistnet": "blockmean"}])
    assert found == [
        ["pooling=mean", "depth=d1"],
        ["pooling=mean", "depth=d2"],
        ["pooling=cls", "depth=d1"],
        ["pooling=cls", "depth=d2"],
        ["gistnet=blockmean"],
    ]


def test_what_the_command_line_gives_holds_for_every_grid_and_wins():
    (found,) = jobs([{"depth": "d1,d2"}, {"gistnet": "blockmean"}], ["depth=d4", "seed=0,1"])
    assert found == [
        ["depth=d4", "seed=0"],
        ["depth=d4", "seed=1"],
        ["gistnet=blockmean", "depth=d4", "seed=0"],
        ["gistnet=blockmean", "depth=d4", "seed=1"],
    ]


def test_a_job_that_two_grids_have_runs_once():
    (found,) = jobs([{"depth": "d1,d2"}, {"depth": "d2,d4"}])
    assert found == [["depth=d1"], ["depth=d2"], ["depth=d4"]]


def test_without_grids_it_is_hydras_own_sweeper():
    assert jobs([], ["seed=0,1"]) == [[["seed=0"], ["seed=1"]]]
    assert jobs([]) == [[[]]]


def test_jobs_come_in_chunks_of_max_batch_size_across_grids():
    assert [len(chunk) for chunk in jobs([{"seed": "0,1,2"}, {"depth": "d1,d4"}], at_once=2)] == [2, 2, 1]


def test_null_as_a_choice_is_hydras_null():
    assert jobs([{"stage.muon_lr": None}]) == [[["stage.muon_lr=null"]]]


def test_the_sweep_over_heads_and_depths_is_20_jobs_with_the_two_controls():
    cfg = compose(["experiment=sweep_heads_depths"], with_hydra=True)
    assert cfg.hydra.sweeper._target_ == "hydra_plugins.megactx.Grids"
    (found,) = jobs(cfg.hydra.sweeper.grids, ["experiment=sweep_heads_depths"])
    assert len(found) == 20 and len({*map(tuple, found)}) == 20
    controls = [job for job in found if "gistnet=blockmean" in job]
    assert [job[1] for job in controls] == ["gistnet.head=linear", "gistnet.head=mlp"]
    others = {tuple(job[:3]) for job in found if job not in controls}
    poolings, heads, depths = (("mean", "query", "cls"), ("linear", "mlp"), ("d1", "d2", "d4"))
    assert others == {
        (f"pooling={p}", f"gistnet.head={h}", f"depth={d}") for p in poolings for h in heads for d in depths
    }


def test_every_job_of_the_sweep_trains_on_as_many_tokens():
    cfg = compose(["experiment=sweep_heads_depths"], with_hydra=True)
    (found,) = jobs(cfg.hydra.sweeper.grids, ["experiment=sweep_heads_depths"])
    lengths = set()
    for job in [*found[:18:5], *found[18:]]:  # to compose all takes long
        one = compose(job)
        p = one.preset
        lengths.add((p.steps, p.accumulate, p.batch, p.spans, one.stage.horizon, one.gistnet.block_size, one.seed))
    assert len(lengths) == 1


def test_an_experiment_that_is_a_sweep_says_so_in_its_name():
    """The tests compose others once less, see ``composing``: one that they take for a run trains for long."""
    for path in root("conf").rglob("*.yaml"):
        assert ("mode: MULTIRUN" in path.read_text()) == path.name.startswith("sweep"), path


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        ("[mean]", "hydra.sweeper.grids[0]=mean: it must be a mapping"),
        ("[{depth: d1},{depth: 'd1,[d2'}]", "hydra.sweeper.grids[1]: depth=d1,[d2 cannot be read"),
        ("[{gistnet.haed: mlp}]", "Did you mean gistnet.head"),
        ("[{depth: 'd1,d3'}]", "There is d1, d2, d4"),
    ],
    ids=["no mapping", "unreadable", "no such setting", "no such option"],
)
def test_a_bad_grid_gives_one_clear_message_and_code_2(grids, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["experiment=sweep_heads_depths", f"hydra.sweeper.grids={grids}"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and len(captured.err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("outcome.json"))
