"""The rooms are a ladder: each imports only from those below it. Hydra and Lightning stay where they belong."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megactx"
# Rooms of one line do not import each other either.
LADDER = [
    {"studies"},  # the endurance of a session is measured with the options of the apps
    {"apps"},
    {"stages"},
    {"evaluation"},
    {"runtime"},
    {"parts"},
    {"focus"},
    {"memory"},
    {"gist"},
    {"lm"},
    {"data"},
    {"framework"},
    {"assets"},
]
LEVEL = {room: level for level, rooms in enumerate(LADDER) for room in rooms}
WITH_FRAMEWORKS = {"studies", "stages", "framework", "data"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


@cache
def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, wherever in it."""
    inside = ["megactx", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_below_it(path):
    room = path.relative_to(PACKAGE).parts[0]
    assert room in LEVEL, f"{room} has no place in the ladder"
    used = {name.split(".")[1] for name in imports(path) if name.startswith("megactx.")} - {room}
    above = {other for other in used if other in LEVEL and LEVEL[other] <= LEVEL[room]}
    assert not above, f"{room} imports from {above}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_hydra_and_lightning_stay_out_of_library_rooms(path):
    if path.relative_to(PACKAGE).parts[0] not in WITH_FRAMEWORKS:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"hydra", "omegaconf", "lightning", "pytorch_lightning"}


def test_the_package_imports_nothing_heavy_and_gives_its_names_on_first_use():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import megactx\n"
        "assert not {'torch', 'lightning', 'transformers', 'hydra'} & {*sys.modules}\n"
        "from megactx import BaseLM, GistNet\n"
        "assert BaseLM.__module__ == 'megactx.lm.base' and GistNet.__module__.startswith('megactx.gist')\n"
        "assert not {'lightning', 'hydra'} & {*sys.modules}\n"
        "assert not hasattr(megactx, 'NoSuchName')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(PACKAGE.parent)], check=True)


def test_the_framework_asks_a_stage_for_nothing_that_a_stage_does_not_declare():
    """No ``getattr`` with a default on stages: what a hook is and does when a stage has none says ``Stage``."""
    asked = [
        (path.name, node.lineno)
        for path in (PACKAGE / "framework").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr")
        if ast.unparse(node.args[0]) in ("stage", "pl_module", "self.lightning_module", "kind")
    ]
    assert not asked
