"""The Python of docs/serving.md runs as it stands there, but for the places that a reader fills in."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from test_serve import MODEL, Service

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
CLIENT, PLAIN, VLLM = (code.partition("```")[0] for code in PAGE.split("```python\n")[1:])


def filled(code: str, **places: str) -> str:
    for name, value in places.items():
        shown = {"model": "OUT", "key": "mega-...", "port": "8766", "vllm": "8000"}[name]
        assert shown in code
        code = code.replace(shown, value)
    return code


def test_a_client_of_the_page_is_answered(make_models, tmp_path, capsys):
    service = Service(tmp_path, make_models())
    try:
        places = {"model": MODEL, "key": service.keys["anna"], "port": str(service.server.port)}
        exec(filled(CLIENT, **places), {})
    finally:
        service.close()
    assert len(capsys.readouterr().out) > 10


@pytest.fixture
def room(exported, monkeypatch):
    """What the code for plain transformers has made, of a window that fits the small models."""
    from megactx.runtime import controller, settings

    monkeypatch.setattr(controller.Settings, "__init__", _small(settings.Settings.__init__))
    room = {}
    exec(filled(PLAIN, model=str(exported)), room)
    return room


def _small(original):
    def init(self, budget=400, **given):
        original(self, budget=budget, **given)

    return init


def test_plain_transformers_go_on_with_a_window_as_the_session_does(room, capsys):
    assert (room["window"].lods() > 0).any()  # there are gists in it
    block = room["window"].tree.block_size
    count = block - room["waiting"].shape[1]
    assert count > 0 and room["told"][:count] == [piece.token for piece in room["session"].generate(count)]


def test_a_window_is_sent_in_the_form_that_vllm_documents(room, exported):
    asked = []

    class Completions(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
            choice = {"index": 0, "text": " Wren", "finish_reason": "length", "logprobs": None}
            body = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Completions) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        exec(filled(VLLM, model=str(exported), vllm=str(server.server_port)), room)
        server.shutdown()
    assert room["answer"].choices[0].text == " Wren"
    (path, body), *_ = asked
    assert path == "/v1/completions" and body["prompt"] == "" and body["max_tokens"] == 16
    sent = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    assert sent.ndim == 2 and sent.dtype == torch.float32 and torch.equal(sent, room["vectors"][0])
