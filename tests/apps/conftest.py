"""Small models and their sessions: see ``small_sessions``. A PostgreSQL server, where one is asked for."""

import shutil
import tempfile
from pathlib import Path

import postgres
import pytest
from small_sessions import (  # noqa: F401  fixtures
    byte_models,
    byte_tokenizers,
    controller,
    exported,
    foretelling,
    foretelling_models,
    ids,
    make_models,
    models,
)

pytest.register_assert_rewrite("markets")  # a plugin that tests import from


@pytest.fixture(scope="session")
def cluster():
    """Of PostgreSQL, for all tests of a process."""
    if postgres.binaries() is None:
        pytest.skip(postgres.HOW)
    folder = Path(tempfile.mkdtemp(prefix="megactx-pg-"))
    try:
        found = postgres.Cluster(folder)
        yield found
        found.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database(request):
    """Where the market has its tables: ``None`` is SQLite; the address of an empty database."""
    return None if request.param == "sqlite" else request.getfixturevalue("cluster").new()
