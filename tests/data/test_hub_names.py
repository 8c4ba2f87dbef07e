"""Names of models on a hub: one that answers is asked, and one that does not costs no minute."""

import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from megactx.data.gguf_base import loadable
from megactx.lm import BaseLM


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A hub that nobody runs, and a cache of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_name_is_refused_at_once_where_no_hub_answers(nobody):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^stage.weights=my_model: there is no such folder, .*127.0.0.1:9 does not"):
        BaseLM.from_pretrained("my_model", setting="stage.weights")
    assert time.monotonic() - began < 10


def test_what_was_kept_of_a_model_is_read_where_no_hub_answers(nobody, base_folder, monkeypatch):
    snapshot = nobody / "models--owner--model" / "snapshots" / "abc"
    shutil.copytree(base_folder, snapshot)
    (nobody / "models--owner--model" / "refs").mkdir()
    (nobody / "models--owner--model" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(nobody))
    assert loadable("owner/model") == str(snapshot)
    assert BaseLM.from_pretrained("owner/model").tokenizer is not None


def test_a_hub_that_answers_is_asked(monkeypatch):
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert loadable("owner/model") == "owner/model"
    finally:
        server.shutdown()
        server.server_close()
