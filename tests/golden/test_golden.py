"""What the method finds at fixed seeds stays what it is: curves of every stage, reports, the ladder, a session.

``MEGACTX_GOLDEN=write pytest tests/golden -m ''`` writes the files anew. Do that in a commit of its own, which says
which fault was mended.
"""

import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch
from cases import PRECISIONS, RUNS, machine, session, trained, world

from megactx.framework.run.device import cpu_bf16_units

HERE = Path(__file__).parent
# On another kind of machine sums have another order. Both are relative, and absolute below 1: of losses, and of what
# divides by small differences or follows gradients. bf16 rounds differently there from the first step on.
LOSSES, ELSEWHERE = 1e-6, 1e-3


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum depends on them
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGACTX_CPU_BF16", "none")  # Newton-Schulz works in bf16 where the CPU has units
        cpu_bf16_units.cache_clear()
        yield world(tmp_path_factory.mktemp("golden"))
    cpu_bf16_units.cache_clear()
    torch.set_num_threads(threads)


def read(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


def compare(name: str, precision: str, found: dict) -> None:
    path = HERE / f"{name}_{precision}.json.gz"
    found = json.loads(json.dumps(found))
    if os.environ.get("MEGACTX_GOLDEN") == "write":
        content = json.dumps({"machine": machine(), "found": found}, separators=(",", ":"))
        path.write_bytes(gzip.compress(content.encode(), mtime=0))
        return
    wanted = read(path)
    wrong = list(differences(wanted["found"], found, wanted["machine"] == machine()))
    assert not wrong, f"{len(wrong)} numbers differ, as {'; '.join(wrong[:5])}"


def differences(wanted, found, exactly: bool, where: str = ""):
    """A line per number that is another, or not near enough on another machine, or missing, or new."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted({*wanted, *found}):
            if key not in wanted or key not in found:
                yield f"{where}.{key} is {'gone' if key in wanted else 'new'}"
            else:
                yield from differences(wanted[key], found[key], exactly, f"{where}.{key}")
    elif isinstance(wanted, list) and isinstance(found, list):
        if len(wanted) != len(found):
            yield f"{where} has {len(found)} entries, not {len(wanted)}"
        for index, (a, b) in enumerate(zip(wanted, found, strict=False)):
            yield from differences(a, b, exactly, f"{where}[{index}]")
    elif isinstance(wanted, float) and isinstance(found, float):
        loss = where.endswith(("loss", "dnll", "nll")) and ".train/" in where
        near = 0.0 if exactly else LOSSES if loss else ELSEWHERE
        if not math.isclose(wanted, found, rel_tol=near, abs_tol=near) and not (wanted != wanted and found != found):
            yield f"{where}: {wanted!r} -> {found!r}"
    elif wanted != found:
        yield f"{where}: {wanted!r} -> {found!r}"


QUICK = ("base_lm_fp32",)


def marks_of(name: str, precision: str) -> list:
    """bf16 is emulated on most CPUs, which takes long."""
    return [] if f"{name}_{precision}" in QUICK else [pytest.mark.slow if precision == "fp32" else pytest.mark.long]


@pytest.mark.parametrize(
    ("name", "precision"),
    [pytest.param(name, precision, marks=marks_of(name, precision)) for name in RUNS for precision in PRECISIONS],
)
def test_a_training_and_its_report_are_what_they_were(name, precision, places, tmp_path):
    path = HERE / f"{name}_{precision}.json.gz"
    if precision == "bf16" and path.exists() and (there := read(path)["machine"]) != machine():
        pytest.skip(f"made on {there}, and this is {machine()}")
    overrides = [*RUNS[name](places), f"trainer.precision={PRECISIONS[precision]}"]
    compare(name, precision, trained(tmp_path / "run", places, overrides))


def test_a_session_says_the_same_64_tokens_behind_the_same_edits(places):
    compare("session", "fp32", session(places))
