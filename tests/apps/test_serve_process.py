"""The service as a process: killed in the middle, asked by a fuzzer, ended politely."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from openai import OpenAI, OpenAIError

from megactx.apps.serve import __main__ as command
from megactx.apps.serve import keys
from megactx.runtime import Controller, Session, Settings, load_models

REPOSITORY = Path(__file__).parents[2]
BUDGET = 512


class Process:
    """``python -m megactx.apps.serve`` on the embedded models."""

    def __init__(self, folder, names):
        self.folder, path = folder, folder.with_suffix(".json")
        self.keys = {name: keys.add(path, name) for name in names}
        arguments = [str(folder), "--key-file", str(path), "--port", "0", "--budget", str(BUDGET)]
        arguments += ["--requests-a-minute", "100000", "--tokens-a-minute", "100000000"]
        env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        self.errors = folder.with_suffix(".err").open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megactx.apps.serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=env,
        )
        self.address = self.process.stdout.readline().split()[0]

    def say(self, name, text, **settings):
        client = OpenAI(base_url=self.address, api_key=self.keys[name], max_retries=0, timeout=60)
        asked = [{"role": "user", "content": text}]
        return client.chat.completions.create(model="megactx", messages=asked, **settings)

    def end(self, how):
        self.process.send_signal(how)
        self.process.stdout.close()
        code = self.process.wait(30)
        self.errors.close()
        return code


@pytest.fixture
def start(tmp_path):
    """names -> a process, on the memories of this test; none outlives it."""
    started = []

    def make(names):
        started.append(Process(tmp_path / "memories", names))
        return started[-1]

    yield make
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


@pytest.mark.long
def test_after_a_kill_in_the_middle_every_finished_turn_is_there(start, tmp_path):
    names, finished = ["anna", "bert", "cleo"], []
    first = start(names)

    def talk(name):
        try:
            for n in range(10_000):
                question = f"turn {n} of {name}."
                first.say(name, question, max_tokens=8, stream=False)
                finished.append((name, question))
        except OpenAIError:
            pass

    threads = [threading.Thread(target=talk, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    while len(finished) < 12:
        time.sleep(0.01)
    first.end(signal.SIGKILL)
    for thread in threads:
        thread.join()
    second = start(names)  # the same names, new keys
    for name in names:
        assert second.say(name, "after the kill", max_tokens=8).usage.completion_tokens > 0
    assert second.end(signal.SIGTERM) == 0
    controller = Controller(load_models(), Settings(budget=BUDGET))
    for name in names:
        with Session.load(tmp_path / "memories" / name, controller) as session:
            text = session.text()
        own = [question for whose, question in finished if whose == name]
        assert len(own) > 0 and [text.count(question) for question in own] == [1] * len(own)
        assert not re.search("|".join(f"of {other}" for other in names if other != name), text)
        assert text.count("after the kill") == 1
    assert "Traceback" not in (tmp_path / "memories.err").read_text()


@pytest.mark.long
def test_what_a_fuzzer_asks_gives_no_error_of_the_server(start, tmp_path):
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error

    service = start(["anna"])
    schema = schemathesis.openapi.from_url(service.address.removesuffix("/v1") + "/openapi.json")
    headers = {"Authorization": f"Bearer {service.keys['anna']}"}
    statuses, ends = [], time.monotonic() + 8
    right, wrong = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    quiet = settings(
        max_examples=40, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None
    )
    for operation in schema.get_all_operations():
        for mode in (right, wrong) if operation.ok().method == "post" else (right,):

            @quiet
            @given(case=operation.ok().as_strategy(generation_mode=mode))
            def ask(case):
                if time.monotonic() > ends:
                    return
                if isinstance(case.body, dict) and case.method == "POST":
                    case.body = (
                        case.body | {"model": "megactx"} | ({"max_tokens": 1} if "max_tokens" in case.body else {})
                    )
                response = case.call(headers=headers)
                statuses.append(response.status_code)
                case.validate_response(response, checks=[not_a_server_error])
                assert "Traceback" not in response.text

            ask()
    assert service.say("anna", "still there", max_tokens=2).usage.completion_tokens == 2
    assert service.end(signal.SIGTERM) == 0
    assert "Traceback" not in (tmp_path / "memories.err").read_text()
    assert len(statuses) > 10 and min(statuses) == 200 and 400 in statuses


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--key-file", "nowhere.json"], "no such file"),
        (["--new-key", "anna"], "--new-key needs --key-file"),
        (["--key-file", "nowhere.json", "--new-key", "../x"], "--new-key=../x is not allowed"),
        (["--open", "0"], "--open=0 is not allowed: at least 1"),
        (["--queue", "0"], "--queue=0"),
        (["--tokens", "100000"], "--tokens=100000 is not allowed: at most 4,096"),
        (["--requests-a-minute", "0"], "requests=0 is not allowed"),
        (["--port", "70000"], "--port=70000"),
        (["--megacontext", "none", "--port", "0"], "keeps no tree"),
    ],
)
def test_a_mistake_is_told_in_one_sentence_and_exits_2(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(["memories", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.startswith("megactx: ") and error.count("\n") == 1


def test_a_new_key_is_printed_and_its_hash_is_kept(tmp_path, capsys):
    path = tmp_path / "keys.json"
    assert command.main(["memories", "--key-file", str(path), "--new-key", "anna"]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("mega-") and key not in path.read_text() and list(json.loads(path.read_text())) == ["anna"]
