"""The package works from a wheel: both config roots travel inside."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# What composing needs; the empty environment borrows these from the one that runs the tests.
BORROWED = ("hydra", "omegaconf", "antlr4", "yaml", "packaging")


@pytest.mark.slow
def test_the_wheel_carries_both_config_roots_and_composes_from_anywhere(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(REPOSITORY),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("megactx-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for root in ("configs", "conf"):
        sources = {path.relative_to(REPOSITORY) for path in (REPOSITORY / root).rglob("*.yaml")}
        packed = {
            path.relative_to(site / "megactx" / "_conf") for path in (site / "megactx" / "_conf" / root).rglob("*.yaml")
        }
        assert sources == packed and sources
    libraries = Path(pytest.__file__).parents[1]
    for name in BORROWED:
        (site / name).symlink_to(libraries / name)
    program = "import sys; from megactx.framework.app import run; sys.exit(run())"
    arguments = ["--cfg", "job", "experiment=base_lm"]
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "megactx.stages.base_lm.BaseLMStage" in done.stdout
