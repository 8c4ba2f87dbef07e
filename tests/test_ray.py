"""A cluster of Ray of two hosts, one core each, on two addresses of the loopback: it gives what one process gives."""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import dying
import pytest
import torch
from small_sessions import exported, make_models, models  # noqa: F401  fixtures

from megactx.apps import corpus, ingest
from megactx.framework.errors import RunFailed
from megactx.framework.workers import workers
from megactx.runtime import Controller, Session, Settings, load_models
from megactx.stages import prefills
from megactx.studies import ruler

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[1]
HOSTS = ("127.0.0.2", "127.0.0.3")
SMALL = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster():
    """RAY_ADDRESS names two raylets, and this process uses them."""
    pytest.importorskip("ray", reason="ray is not installed (the extra ray)")
    place = Path(tempfile.mkdtemp(prefix="mx"))  # a short name: sockets lie in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", f"{REPOSITORY}:{Path(dying.__file__).parent}")
        # Whatever temp_dir says, Ray notes its address in $RAY_TMPDIR/ray, and does not make that folder.
        patch.setenv("RAY_TMPDIR", str(place))
        (place / "ray").mkdir()
        from ray.cluster_utils import Cluster

        made = Cluster(
            initialize_head=True, head_node_args={**SMALL, "node_ip_address": HOSTS[0], "temp_dir": str(place)}
        )
        try:
            made.add_node(**SMALL, node_ip_address=HOSTS[1])
            patch.setenv("RAY_ADDRESS", made.address)
            yield made
        finally:
            made.shutdown()
            shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def joined(cluster):
    """This process belongs to the cluster all the time, so that tests share its workers: they take long to start."""
    import ray

    ray.init(log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def own(exported):  # noqa: F811
    return ["--model", str(exported), "--budget", "400"]


def test_what_a_worker_raises_is_raised_here_and_one_that_is_always_lost_ends_the_run(cluster, capfd):
    with workers("ray") as each:
        assert [*each(dying.square, range(20), "numbers")] == [n * n for n in range(20)]
        seen, began = set(), time.monotonic()
        while seen != {*HOSTS} and time.monotonic() - began < 60:  # a busy machine starts the second one later
            seen |= {*each(dying.host, range(6), "numbers")}
        assert seen == {*HOSTS}
        with pytest.raises(ValueError, match="^shard=-1 is not allowed$"):
            [*each(dying.square, [1, -1], "numbers")]
        found = each(dying.never, range(3), "numbers")
        assert next(found) == 0
        with pytest.raises(RunFailed, match="numbers: shard 2 of 3 was tried 3 times, and its worker was lost"):
            next(found)
    assert "2 workers on 2 hosts" in capfd.readouterr().out


def test_the_work_of_a_module_that_is_run_as_a_command_is_found_by_the_workers(cluster):
    ended = subprocess.run([sys.executable, "-m", "dying"], capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines() == ["Ray: 2 workers on 2 hosts", "0x0 0x1 0x2"], ended.stderr


def opened(folder: Path, own: list[str]) -> Session:
    return Session.load(folder, Controller(load_models(own[1], "cpu"), Settings(budget=400)))


def known(session: Session) -> dict:
    """What is known of the files, but for when they were read."""
    files = session.about["ingested"].items()
    return {name: about | {"spans": [span[:3] for span in about["spans"]]} for name, about in files}


def test_files_over_two_hosts_are_the_session_of_one_process_and_a_killed_worker_costs_its_shard_only(
    joined, own, texts, tmp_path, monkeypatch
):
    for name, value in {"RANGE": 2_048, "TEXT": 2**14, "make_gists": dying.make_gists}.items():
        monkeypatch.setattr(corpus, name, value)
    files = sorted(map(str, texts.glob("*.py")))[:7]
    assert ingest.main([*files, str(tmp_path / "one"), *own]) == 0
    assert ingest.main([*files, str(tmp_path / "two"), "--engine", "ray", *own]) == 0
    with opened(tmp_path / "one", own) as one, opened(tmp_path / "two", own) as two:
        assert torch.equal(one.ids(), two.ids()) and one.length > 15_000
        assert known(one) == known(two) and one.about.keys() == two.about.keys()
        assert one.tree.depth == two.tree.depth > 5
        for lod in range(1, one.tree.depth + 1):
            assert torch.equal(one.tree.gists(lod), two.tree.gists(lod)), lod
    tries = {path.name: path.read_text().split() for path in tmp_path.glob("*.tries")}
    assert len(tries) > 6 and len({*tries["range-004096.tries"]}) == 2
    assert {name: len(pids) for name, pids in tries.items() if len(pids) > 1} == {"range-004096.tries": 2}
    assert not (tmp_path / "two.parts").exists()


def test_questions_over_two_hosts_leave_the_files_of_one_process(joined, tmp_path, capsys):
    asked = ["--tasks", "niah_single_2", "--lengths", "400", "--cases", "3", "--budget", "128"]
    asked += ["--policies", "newest", "needed", "--answers", "1", "--path", f"{REPOSITORY / 'docs'}/*.md"]
    for name, engine in {"one": "process", "two": "ray"}.items():
        assert ruler.main([*asked, "--out", str(tmp_path / name), "--engine", engine]) == 0
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".png"}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert len(one) >= 6 and one == two


def test_prefills_over_two_hosts_have_the_bits_of_one_process(joined, gist_settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prefills, "SHARD", 4_096)
    found = []
    for engine in ("process", "ray"):
        monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path / engine))
        assert prefills.main(["--engine", engine, *gist_settings, "stage.prefills.gigabytes=1"]) == 0
        folder = tmp_path / engine / "prefills"
        found.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")})
    assert len(found[0]) > 50 and found[0] == found[1]
