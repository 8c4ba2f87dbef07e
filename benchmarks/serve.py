"""What a server holds: many clients with a memory each, for a bounded time; nothing is lost, and memory stays flat.

    python benchmarks/serve.py [--clients 50] [--seconds 60] [--model asset:tiny-base] [--kill]

Each client has a key of its own and says one thing after the other, through the ``openai`` client, every second one as
a stream. A refusal (429) is asked again when the answer says. After the end every answer that a client has received is
looked for in its memory on disk. With --kill the server is killed (SIGKILL) at half of the time and started again, and
clients ask again what was cut. Waiting is what the server counts, from a request to its first step.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from openai import OpenAI, RateLimitError
from rich.console import Console
from rich.table import Table

from megactx.apps.serve import keys
from megactx.framework.command_line import run
from megactx.runtime import Controller, Session, Settings, load_models

BUDGET, TOKENS, SAMPLES = 512, 16, 12


class Client(threading.Thread):
    """Says one thing after the other until the time is over."""

    def __init__(self, name: str, key: str, address: str, ends: float, gone: threading.Event):
        super().__init__(daemon=True)
        self.name, self.ends, self.gone, self.cut = name, ends, gone, 0
        self.openai = OpenAI(base_url=address, api_key=key, max_retries=0, timeout=300)
        self.told: list[tuple[str, str]] = []  # question, answer
        self.seconds: list[float] = []
        self.refused, self.failures = 0, []

    def run(self) -> None:
        model = self.openai.models.list().data[0].id
        while time.monotonic() < self.ends:
            question, began = f"This is turn {len(self.told)} of {self.name}.", time.monotonic()
            asked = dict(model=model, messages=[{"role": "user", "content": question}], max_tokens=TOKENS)
            try:
                if len(self.told) % 2:
                    pieces = self.openai.chat.completions.create(**asked, stream=True)
                    answer = "".join(piece.choices[0].delta.content or "" for piece in pieces)
                else:
                    answer = self.openai.chat.completions.create(**asked).choices[0].message.content
            except RateLimitError as error:
                self.refused += 1
                time.sleep(float(error.response.headers["retry-after"]))
                continue
            except Exception as error:
                if self.gone.is_set():  # the server was killed, and may not be back yet
                    self.cut += 1
                    time.sleep(0.5)
                    continue
                self.failures.append(f"{type(error).__name__}: {error}")
                continue
            self.told.append((question, answer))
            self.seconds.append(time.monotonic() - began)


def benchmark(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, path = Path(place) / "memories", Path(place) / "keys.json"
        names = [f"client{n:02d}x" for n in range(arguments.clients)]
        known = {name: keys.add(path, name) for name in names}
        command = [sys.executable, "-m", "megactx.apps.serve", str(folder), "--key-file", str(path), "--port", "0"]
        command += ["--requests-a-minute", "100000", "--tokens-a-minute", "100000000", "--budget", str(BUDGET)]
        command += ["--queue", str(arguments.queue), "--open", str(arguments.open)]
        command += [] if arguments.model is None else ["--model", arguments.model]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        address = server.stdout.readline().split()[0]
        ends = time.monotonic() + arguments.seconds
        gone = threading.Event()
        clients = [Client(name, known[name], address, ends, gone) for name in names]
        for client in clients:
            client.start()
        memory = []
        for sample in range(SAMPLES):
            time.sleep(arguments.seconds / SAMPLES)
            gone.clear()
            if arguments.kill and sample == SAMPLES // 2:
                gone.set()
                server.kill()
                server.wait()
                command[command.index("--port") + 1] = address.rpartition(":")[2].partition("/")[0]
                server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                server.stdout.readline()
            memory.append(psutil.Process(server.pid).memory_info().rss / 2**20)
        for client in clients:
            client.join()
        health = clients[0].openai.get("/../health", cast_to=object)
        spent = sum(psutil.Process(server.pid).cpu_times()[:2])
        server.send_signal(signal.SIGTERM)
        code = server.wait()
        lost = _lost(folder, clients, arguments.model)
    seconds = sorted(s for client in clients for s in client.seconds)
    result = {
        "clients": len(clients),
        "seconds": arguments.seconds,
        "turns": len(seconds),
        "least_turns_of_a_client": min(len(client.told) for client in clients),
        "most_turns_of_a_client": max(len(client.told) for client in clients),
        "lost": lost,
        "failures": [failure for client in clients for failure in client.failures],
        "cut": sum(client.cut for client in clients),
        "refused": sum(client.refused for client in clients),
        "exit": code,
        "seconds_of_a_turn": {p: seconds[len(seconds) * p // 100] for p in (50, 99)},
        "seconds_of_waiting": {p: health[f"wait_p{p}"] for p in (50, 99)},
        "tokens_read_together": health["together"],
        "cpu_seconds": spent,
        "MiB": [round(m) for m in memory],
    }
    table = Table(title=f"{len(clients)} clients, {TOKENS} tokens an answer, --open {arguments.open}")
    for heading in ("turns", "lost", "failures", "refused", "turn p50 / p99 s", "waiting p50 / p99 s", "MiB over time"):
        table.add_column(heading)
    table.add_row(
        *(str(result[name]) for name in ("turns", "lost")),
        str(len(result["failures"])),
        str(result["refused"]),
        *(
            " / ".join(f"{result[name][p]:.2f}" for p in (50, 99))
            for name in ("seconds_of_a_turn", "seconds_of_waiting")
        ),
        " ".join(str(m) for m in result["MiB"]),
    )
    Console().print(table)
    print(json.dumps(result))


def _lost(folder: Path, clients: list[Client], model: str | None) -> int:
    """Answers that a client has and its memory has not."""
    controller, lost = Controller(load_models(model), Settings(budget=BUDGET)), 0
    for client in clients:
        if not client.told:
            continue
        with Session.load(folder / client.name, controller) as session:
            text = session.text()
        for question, answer in client.told:
            place = text.find(question)
            lost += place < 0 or answer.strip() not in text[place:]
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--open", type=int, default=16, help="of the server")
    parser.add_argument("--queue", type=int, default=64, help="of the server")
    parser.add_argument("--model")
    parser.add_argument("--kill", action="store_true", help="the server at half of the time, and start it again")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return run(benchmark, parser, None)


if __name__ == "__main__":
    sys.exit(main())
