"""The service over real connections, asked by the client that programs use."""

import http.client
import json
import platform
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from openai import APIStatusError, AuthenticationError, BadRequestError, NotFoundError, OpenAI, RateLimitError

from megactx.apps.command_line import curation_of
from megactx.apps.serve import __main__ as command
from megactx.apps.serve import keys
from megactx.apps.serve.app import build
from megactx.apps.serve.engine import Engine
from megactx.apps.serve.memory import Message, new_messages
from megactx.apps.serving import Server
from megactx.memory import archive
from megactx.memory.curation import Curated
from megactx.runtime import Controller, Sampling, Session
from megactx.runtime.node_prefill import NodePrefill
from megactx.runtime.settings import Settings

MODEL = "small"
SMALL = Settings(budget=96, allocator={"protected": 8})


class Service:
    """A running service; ``client(NAME)`` asks with that key."""

    def __init__(
        self,
        folder,
        models,
        names=("anna", "bert"),
        open=4,
        queue=64,
        requests=10_000,
        tokens=10**9,
        curation=None,
        settings=SMALL,
    ):
        self.folder, self.controller = folder, Controller(models, settings)
        self.keys = {name: keys.generated() for name in names}
        entries = {name: next(iter(keys.alone(key).values())) for name, key in self.keys.items()}
        self.engine = Engine(folder, self.controller, open, queue, curation=curation).start()
        self.server = Server(0)
        known = keys.Keys(entries, requests, tokens)
        app = build(self.engine, known, MODEL, 12, Sampling(), self.server.host)
        self.server.start(app, ending=self.engine.end)

    def client(self, name="anna"):
        key = self.keys.get(name, name)
        return OpenAI(base_url=f"{self.server.address}/v1", api_key=key, max_retries=0, timeout=60)

    def close(self):
        self.server.close()
        self.engine.close()


@pytest.fixture
def serve(make_models, tmp_path):
    running = []

    def make(folder=None, **settings):
        running.append(Service(folder or tmp_path / "memories", make_models(), **settings))
        return running[-1]

    yield make
    for service in running:
        service.close()


@pytest.fixture(scope="module")
def service(make_models, tmp_path_factory):
    """One that many tests ask."""
    found = Service(tmp_path_factory.mktemp("service"), make_models())
    yield found
    found.close()


def say(client, *talk, **settings):
    """user, assistant, user, ... -> the answer."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(talk)]
    return client.chat.completions.create(model=MODEL, messages=messages, **settings)


def remembered(service, name):
    """The text of a memory as it is on disk; the server must not hold it."""
    with Session.load(service.folder / name, service.controller) as session:
        return session.text()


def test_an_answer_comes_whole_or_in_pieces_and_is_the_same(serve):
    whole = serve(names=["anna", "bert"])
    answer = say(whole.client("anna"), "def read(path):", max_tokens=20)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 20
    pieces = [*say(whole.client("bert"), "def read(path):", max_tokens=20, stream=True)]
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == answer.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == "length" and len(pieces) > 5


def test_tokens_are_counted_in_a_stream_that_asks_for_it(service):
    *_, last = say(service.client(), "one two three", stream=True, stream_options={"include_usage": True}, max_tokens=5)
    assert last.choices == [] and last.usage.completion_tokens == 5
    assert last.usage.total_tokens == last.usage.prompt_tokens + 5 and last.usage.prompt_tokens > 3


def test_the_model_is_listed(service):
    client = service.client()
    assert [m.id for m in client.models.list()] == [MODEL] and client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(NotFoundError, match="one model"):
        client.models.retrieve("gpt-4/x")


def test_tools_are_taken_and_not_called(service):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    answer = say(service.client(), "call f", tools=[tool], tool_choice="auto", user="someone", presence_penalty=1)
    assert answer.choices[0].message.tool_calls is None and answer.choices[0].message.content is not None


def test_a_stop_string_ends_the_answer_and_is_not_told(serve):
    service = serve()
    text = say(service.client("anna"), "import os", max_tokens=12).choices[0].message.content
    stop = text[4:6]
    answer = say(service.client("bert"), "import os", max_tokens=12, stop=[stop])
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.content == text[: text.index(stop)]


def test_a_whole_talk_that_is_sent_again_is_read_once(serve):
    service = serve()
    client, talk, read = service.client(), [], []
    for question in ("first question", "second question", "third question"):
        answer = say(client, *talk, question)
        talk += [question, answer.choices[0].message.content]
        read.append(answer.usage.prompt_tokens)
    assert max(read) < read[0] + 6  # not the talk again
    service.close()
    text = remembered(service, "anna")
    assert [text.count(q) for q in talk[::2]] == [1, 1, 1]


def test_a_service_under_megaattention_keeps_what_it_answers_in_memories_that_go_on(serve):
    service = serve(names=["anna"], settings=replace(SMALL, attention="mega", segment=16, mid=16, live=16))
    questions = ("def read(path): " * 12, "go on")
    answers = [say(service.client(), question, max_tokens=20).choices[0].message.content for question in questions]
    service.close()
    text = remembered(service, "anna")
    assert all(len(answer) > 5 and answer in text for answer in answers)
    with Session.load(service.folder / "anna", service.controller) as session:
        assert isinstance(session.stream.prefill, NodePrefill) and len([*session.generate(5)]) == 5


@pytest.mark.slow
def test_a_memory_is_curated_between_its_turns_and_nobody_elses(serve, monkeypatch):
    monkeypatch.setattr(archive, "RECENT", 64)
    long = " ".join(f"line {n} says {n * n}" for n in range(40))
    service = serve(curation=curation_of("default,policies.unread.behind=64,every=64"))
    say(service.client("bert"), long, max_tokens=4)  # it has its first turn, and none behind it
    for n in range(2):
        say(service.client("anna"), f"{n} {long}", max_tokens=12)
    service.close()
    anna, bert = (Curated(service.folder / name / "tree") for name in ("anna", "bert"))
    assert (anna.floor > 0).sum() > 20 and {entry[1] for entry in anna.log()} == {"compact"}
    assert not (bert.floor > 0).any() and bert.log() == []
    with Session.load(service.folder / "anna", service.controller) as session:
        assert session.restore() > 0 and session.text().count(long) == 2


def test_the_command_gives_the_named_curation_to_its_memories(exported, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(Server, "run", lambda self, app, ending, connections: seen.append(ending.__self__.curation))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    asked = [str(tmp_path), "--port", "0", "--model", str(exported), "--budget", "400"]
    assert command.main([*asked, "--curation", "unread,every=5"]) == 0 and command.main(asked) == 0
    assert seen == [curation_of("unread,every=5"), None]
    assert command.main([*asked, "--curation", "unraed"]) == 2
    assert "Did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "messages", "new"),
    [
        ("u1 a1", "u1 a1 u2", "u2"),  # the whole talk
        ("u1 a1", "u2", "u2"),  # what is new alone
        ("u1 a1", "u1", "u1"),  # said again
        ("u1 a1 u2 a2", "a1 u2 a2 u3", "u3"),  # the end of the talk
        ("u1 a1 u2 a2", "u1 a1 u3", "u3"),  # another way from the middle
        ("", "u1 a1 u2", "u1 a1 u2"),  # a talk with somebody else
        ("u1 a1", "u1 a9 u2", "a9 u2"),
        ("s u1 a1", "s u2", "u2"),  # the same instructions
        ("s u1 a1", "z u2", "z u2"),
        ("s u1 a1", "s u1 a1 u2 u3", "u2 u3"),
    ],
)
def test_of_the_messages_those_are_new_that_the_memory_has_not_heard(said, messages, new):
    role = {"u": "user", "a": "assistant", "s": "system", "z": "system"}

    def made(words):
        return [Message(role[word[0]], word) for word in words.split()]

    own = {"system": "", "said": []}
    new_messages(made(said), own)
    assert new_messages(made(messages), own) == made(new)


def test_instructions_and_parts_of_text_are_read(serve):
    service = serve()
    messages = [
        {"role": "system", "content": "Speak low."},
        {"role": "user", "content": [{"type": "text", "text": "zebra one"}, {"type": "text", "text": "zebra two"}]},
    ]
    service.client().chat.completions.create(model=MODEL, messages=messages)
    service.close()
    assert "Speak low.\n\nzebra one\nzebra two" in remembered(service, "anna")


def test_a_key_never_sees_the_memory_of_another(serve, tmp_path):
    def answers(service, others):
        found = []
        for n in range(2):
            asked = [threading.Thread(target=say, args=(service.client("anna"), f"secret number {n}" * 9))] * others
            for thread in asked:
                thread.start()
            found.append(say(service.client("bert"), f"what is the secret {n}", max_tokens=12))
            for thread in asked:
                thread.join()
        return [(a.choices[0].message.content, a.usage.total_tokens) for a in found]

    both, alone = serve(tmp_path / "both"), serve(tmp_path / "alone")
    assert answers(both, 1) == answers(alone, 0)  # what anna says makes no difference to bert
    both.close()
    assert "secret number" in remembered(both, "anna") and "secret number" not in remembered(both, "bert")


def test_a_memory_goes_on_after_the_server_was_stopped(serve, tmp_path):
    first = serve(tmp_path / "m")
    say(first.client(), "remember the zebra")
    first.close()
    second = serve(tmp_path / "m")
    say(second.client(), "and the lion")
    second.close()
    text = remembered(second, "anna")
    assert text.index("remember the zebra") < text.index("and the lion")


@pytest.mark.slow
def test_more_memories_than_may_be_open_all_answer(serve):
    names = [f"k{n}" for n in range(4)]
    service = serve(names=names, open=2)
    for round in range(2):
        threads = [threading.Thread(target=say, args=(service.client(n), f"round {round} of {n}")) for n in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert service.engine.state()["finished"] == 8 and service.engine.state()["open"] <= 2
    service.close()
    for name in names:
        assert [remembered(service, name).count(f"round {r} of {name}") for r in (0, 1)] == [1, 1]


def test_a_short_answer_need_not_wait_for_the_end_of_a_long_one(serve):
    service, ends = serve(), {}

    def ask(name, tokens):
        say(service.client(name), "go on", max_tokens=tokens)
        ends[name] = len(ends)

    long = threading.Thread(target=ask, args=("anna", 100))
    long.start()
    while not service.engine.state()["active"]:
        time.sleep(0.01)
    ask("bert", 4)
    long.join()
    assert ends == {"bert": 0, "anna": 1}


def test_who_asks_too_often_is_told_when_to_come_back(serve):
    service = serve(requests=2)
    for _ in range(2):
        say(service.client(), "hello")
    with pytest.raises(RateLimitError, match="2 requests a minute") as refused:
        say(service.client(), "hello")
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
    say(service.client("bert"), "hello")  # each key has its own


def test_who_has_used_up_the_tokens_is_told_when_to_come_back(serve):
    service = serve(tokens=30)
    say(service.client(), "one two three four five six seven eight", max_tokens=40)
    with pytest.raises(RateLimitError, match="30 tokens a minute"):
        say(service.client(), "hello")


def test_more_than_may_wait_are_refused_and_what_waits_is_answered(serve):
    service, told = serve(names=["a", "b", "c"], open=1, queue=2), []

    def ask(name, tokens):
        try:
            told.append(say(service.client(name), "hello", max_tokens=tokens).usage.completion_tokens)
        except RateLimitError as error:
            told.append(int(error.response.headers["retry-after"]))

    threads = [threading.Thread(target=ask, args=("a", 120))]
    threads[0].start()
    while not service.engine.state()["active"]:
        time.sleep(0.01)
    for name in ("b", "c"):
        threads.append(threading.Thread(target=ask, args=(name, 7)))
        threads[-1].start()
    while service.engine.state()["waiting"] < 2:
        time.sleep(0.01)
    ask("b", 7)
    assert told == [1]
    for thread in threads:
        thread.join()
    assert sorted(told) == [1, 7, 7, 120]


def test_whoever_hangs_up_gives_the_place_free_and_what_was_told_stays(serve):
    service = serve(open=1)
    stream = say(service.client(), "count up", max_tokens=4000, stream=True)
    for _ in range(10):
        next(stream)
    stream.close()
    assert say(service.client("bert"), "hello").usage.completion_tokens == 12
    service.close()
    assert 5 < len(remembered(service, "anna")) < 8000 and service.engine.finished == 2


def test_a_failure_leaves_the_memory_as_it_was_and_the_server_answers(serve, monkeypatch, capsys):
    service = serve()
    say(service.client(), "the first is kept")
    broken = service.engine._memories["anna"]
    monkeypatch.setattr(broken, "save", lambda: 1 / 0)
    with pytest.raises(APIStatusError, match="after the last finished turn") as refused:
        say(service.client(), "the second is not")
    assert refused.value.status_code == 500 and "Traceback" not in capsys.readouterr().err
    say(service.client(), "the third is kept")
    service.close()
    text = remembered(service, "anna")
    assert "the first is kept" in text and "the third is kept" in text and "the second is not" not in text


def test_the_end_lets_turns_under_way_finish_and_refuses_new_ones(serve):
    service, told = serve(), []
    thread = threading.Thread(target=lambda: told.append(say(service.client(), "long", max_tokens=40)))
    thread.start()
    while not service.engine.state()["active"]:
        time.sleep(0.01)
    service.engine.end()
    with pytest.raises(APIStatusError) as refused:
        say(service.client("bert"), "hello")
    assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"]
    thread.join()
    assert told[0].usage.completion_tokens > 0
    service.close()
    assert "long" in remembered(service, "anna")


def raw(service, body, path="/v1/chat/completions", method="POST", **headers):
    """-> status, body, of a request as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", service.server.port, timeout=20)
    usual = {"Authorization": f"Bearer {service.keys['anna']}", "Content-Type": "application/json"}
    connection.request(method, path, body, usual | headers, encode_chunked="Transfer-Encoding" in headers)
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    return answer.status, found


def message(**change):
    return {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]} | change


MALFORMED = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "not UTF-8": b'{"model": "\xff"}',
    "a long number": b'{"max_tokens": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 100_000,
    "NaN": b'{"model": "small", "temperature": NaN, "messages": [{"role": "user", "content": "hi"}]}',
    "too much": b" " * (2**20 + 1),
    "no messages": {"model": MODEL},
    "empty messages": message(messages=[]),
    "messages are a word": message(messages="hi"),
    "a message is a word": message(messages=["hi"]),
    "a role of nobody": message(messages=[{"role": "king", "content": "hi"}]),
    "no role": message(messages=[{"content": "hi"}]),
    "no content": message(messages=[{"role": "user"}]),
    "blank content": message(messages=[{"role": "user", "content": " \n"}]),
    "content is a number": message(messages=[{"role": "user", "content": 7}]),
    "half a character": message(messages=[{"role": "user", "content": "\ud800"}]),
    "a picture": message(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    "the last is an answer": message(messages=[{"role": "assistant", "content": "hi"}]),
    "instructions alone": message(messages=[{"role": "system", "content": "hi"}]),
    "no tokens": message(max_tokens=0),
    "fewer than none": message(max_tokens=-1),
    "tokens are a word": message(max_tokens="many"),
    "tokens are a part": message(max_tokens=1.5),
    "too many tokens": message(max_tokens=10**9),
    "cold": message(temperature=-1),
    "hot": message(temperature=1e308),
    "no share": message(top_p=0),
    "a share above all": message(top_p=2),
    "a seed below nothing": message(seed=-1),
    "a seed too large": message(seed=2**64),
    "an empty stop": message(stop=""),
    "an empty stop in a list": message(stop=["a", ""]),
    "five stops": message(stop=["a"] * 5),
    "a stop of half a character": message(stop="\udfff"),
    "two answers": message(n=2),
    "probabilities": message(logprobs=True),
    "stream is a word": message(stream="maybe"),
    "options are a word": message(stream_options="usage"),
    "model is none": message(model=None),
    "another model": message(model="gpt-4"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_refused_in_openais_form(service, name, capfd):
    body = MALFORMED[name]
    before = service.engine.finished
    status, found = raw(service, body if isinstance(body, bytes) else json.dumps(body))
    assert status in (400, 404, 413) and service.engine.finished == before
    error = json.loads(found)["error"]
    assert error["message"] and error["type"] == "invalid_request_error" and set(error) >= {"param", "code"}
    assert "Traceback" not in capfd.readouterr().err


WRONG = ["", "\ud800", "../anna", "a" * 5000, -1, 0, 1.5, 1e308, 10**30, True, None, [], {}, [[]], {"a": {}}, ["\0"]]
BROKEN_BODIES = [body for body in MALFORMED.values() if isinstance(body, bytes) and len(body) < 10_000]


def broken(draw):
    """A request with a field or two that are not what they should be, or none that anybody could read."""
    headers = {"Authorization": draw.choice(["", "Bearer ", "Bearer \xff", "Basic YTpi", "Bearer mega-anna"])}
    headers |= draw.choice([{}, {"Content-Type": "text/plain"}, {"X-Memory": "anna"}, {"Cookie": "megactx=anna"}])
    if draw.random() < 0.8:
        del headers["Authorization"]  # bert's own
    path = draw.choice(["/v1/chat/completions"] * 8 + ["/v1/models/../anna", "/v1/models/%2e%2e%2fanna", "/v1/anna"])
    if draw.random() < 0.2:
        return path, draw.choice(BROKEN_BODIES), headers
    body = message(user="anna", metadata={"memory": "anna"})
    for name in draw.sample(["model", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream"], 2):
        body[name] = draw.choice(WRONG)
    if draw.random() < 0.5:
        said = {"role": draw.choice(["user", *WRONG]), "content": draw.choice(["hi", *WRONG])}
        body["messages"] = [draw.choice([said, *WRONG])]
    return path, json.dumps(body), headers


def test_requests_that_are_broken_by_the_hundred_give_no_error_of_the_server_and_nobody_elses_memory(serve, capfd):
    service, draw, statuses = serve(), random.Random(0), []
    say(service.client("anna"), "secret zebra " * 9, max_tokens=1)
    for _ in range(300):
        path, body, headers = broken(draw)
        usual = {"Authorization": f"Bearer {service.keys['bert']}"}
        status, found = raw(service, body, path, **usual | headers)
        statuses.append(status)
        assert status < 500 and b"Traceback" not in found and b"zebra" not in found, (path, body, headers, found)
    assert statuses.count(200) < 30 and {400, 401, 404} <= {*statuses}
    assert say(service.client("bert"), "hello", max_tokens=2).usage.completion_tokens == 2
    service.close()
    assert "Traceback" not in capfd.readouterr().err
    assert "zebra" in remembered(service, "anna") and "zebra" not in remembered(service, "bert")
    assert {path.name for path in service.folder.iterdir() if path.is_dir()} == {"anna", "bert"}


def test_the_rest_of_http_is_refused_in_openais_form(service):
    for path, method, status in (("/x", "GET", 404), ("/v1/chat/completions", "GET", 405), ("/v1/models", "PUT", 405)):
        found, body = raw(service, None, path, method)
        assert found == status and json.loads(body)["error"]["message"]
    assert raw(service, json.dumps(message()), Host="evil.example")[0] == 403
    status, body = raw(service, json.dumps(message()), Origin="http://evil.example")
    assert status == 403 and json.loads(body)["error"]["type"] == "permission_error"
    for key in ("", "Bearer", "Bearer x", "Basic eDp5", f"Bearer {service.keys['anna']}x", "Bearer \xff"):
        assert raw(service, json.dumps(message()), Authorization=key)[0] == 401
    for _ in range(5):  # the answer comes through although more was on its way
        chunked = iter([b" " * 2**19] * 4)
        assert raw(service, chunked, **{"Transfer-Encoding": "chunked"})[0] == 413
        assert raw(service, " " * 2**21)[0] == 413
        assert raw(service, " " * 2**21, Host="evil.example")[0] == 403


def test_the_client_raises_its_own_errors(service):
    with pytest.raises(AuthenticationError, match="not known"):
        say(service.client("wrong"), "hi")
    with pytest.raises(BadRequestError, match="max_tokens"):
        say(service.client(), "hi", max_tokens=0)


def test_whoever_watches_needs_no_key_and_sees_numbers(service):
    status, body = raw(service, None, "/health", "GET", Authorization="")
    assert status == 200 and set(json.loads(body)) == {
        *("status", "waiting", "active", "open", "finished", "together", "wait_p50", "wait_p99")
    }


def test_a_key_file_holds_hashes_and_a_new_key_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "keys.json"
    old = keys.add(path, "anna")
    other = keys.add(path, "bert")
    path.write_text(json.dumps(json.loads(path.read_text()) | {}))
    new = keys.add(path, "anna")
    assert old not in path.read_text() and new not in path.read_text()
    known = keys.Keys(keys.read(path), 5, 6)
    assert known.holder(old) is None and known.holder(new).name == "anna" and known.holder(other).name == "bert"
    assert known.holder(new).requests.rate == 5 and known.holder("\ud800") is None


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "7", '{"../x": {"sha256": "%s"}}' % ("0" * 64), '{"a": {"sha256": "x"}}', '{"a": 1}', '{"a": {}}'],
)
def test_a_file_that_holds_no_keys_is_refused(tmp_path, content):
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(ValueError, match="--key-file="):
        keys.read(tmp_path / "keys.json")


def test_limits_of_an_entry_come_before_those_of_the_command():
    entry = {"sha256": "0" * 64, "requests": 3}
    holder = next(iter(keys.Keys({"anna": entry}, 5, 6).holders.values()))
    assert (holder.requests.rate, holder.tokens.rate) == (3, 6)
    for wrong in (0, -1, "many", 1.5, True):
        with pytest.raises(ValueError, match="tokens="):
            keys.Keys({"anna": entry | {"tokens": wrong}}, 5, 6)


def test_what_is_left_of_a_minute_is_given_back_with_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(keys.time, "monotonic", lambda: now[0])
    bucket = keys.Bucket(60)
    bucket.take(90)
    assert bucket.wait() == 31
    now[0] = 31.0
    assert bucket.wait() == 0
    now[0] = 1000.0
    bucket.wait()
    assert bucket.left == 60


def test_answers_of_several_keys_are_read_together_and_are_what_each_gets_alone(serve, tmp_path):
    names = ("anna", "bert", "carl")
    asked = {name: [{"role": "user", "content": f"{name} says {name * 3}. And then?"}] for name in names}

    def ask(service, name, found):
        answer = service.client(name).chat.completions.create(model=MODEL, messages=asked[name], max_tokens=50)
        found[name] = answer.choices[0].message.content

    alone, together = serve(tmp_path / "alone", names=names), serve(tmp_path / "together", names=names)
    one, many = {}, {}
    for name in names:
        ask(alone, name, one)
    threads = [threading.Thread(target=ask, args=(together, name, many)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one == many
    assert alone.engine.state()["together"] == 0 < 50 < together.engine.state()["together"]


COMES_AND_GOES = """
import os
import psutil
import torch
from megactx.apps.serve.__main__ import steady_memory

for how in ("steady", "usual"):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    if how == "steady":
        assert steady_memory()
    before, kept = psutil.Process().memory_info().rss, []
    for turn in range(8):
        large = [torch.ones(75_000 + 200_000 * n + 150_000 * turn) for n in range(20)]
        kept += [torch.ones(15_000) for _ in range(20)]  # small ones that stay between
        large.clear()
    print(how, (psutil.Process().memory_info().rss - before - sum(t.nbytes for t in kept)) / 2**20, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_blocks_that_come_and_go_leave_nothing_behind():
    done = subprocess.run([sys.executable, "-c", COMES_AND_GOES], capture_output=True, text=True, check=True)
    left = {how: float(megabytes) for how, megabytes in map(str.split, done.stdout.splitlines())}
    assert left["steady"] < 20 < 100 < left["usual"]  # MiB
