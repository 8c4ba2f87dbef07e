"""What drafts save a session: CPU time per token of greedy answers behind texts, with and without them, in one run.

    python benchmarks/drafts.py [MODEL] --path TEXTS

Both are answered in turn, text by text, so that both see the same machine. Tokens are compared: near ties may round
otherwise in a pass of several tokens.
"""

import argparse
import time
from pathlib import Path

import torch

from megactx.evaluation.bootstrap import mean_interval
from megactx.runtime import Controller, Sampling, Session, Settings, load_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--path", required=True, help="a folder of texts")
    parser.add_argument("--texts", type=int, default=12, help="of them")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens that are there")
    parser.add_argument("--answer", type=int, default=128, help="tokens that follow")
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    models, rows = load_models(args.model), []
    torch.set_num_threads(1)
    paths = [path for path in sorted(Path(args.path).rglob("*")) if path.is_file()]
    for path in paths[:: max(1, len(paths) // args.texts)][: args.texts]:
        text = path.read_text(encoding="utf-8")
        rows.append([answered(models, drafts, text, args) for drafts in ("none", "lookup")])
    speed = torch.tensor([plain[0] / drafted[0] for plain, drafted in rows])
    taken, vain = (sum(drafted[2][n] for _, drafted in rows) for n in (0, 1))
    same = sum(plain[1] == drafted[1] for plain, drafted in rows)
    own = mean_interval(torch.arange(len(rows)), speed)
    print(f"speed {own}; taken {taken} of {taken + vain} tokens; the same tokens in {same} of {len(rows)} texts")
    for n, name in enumerate(("none", "lookup")):
        print(f"{name}: {1000 * sum(row[n][0] for row in rows) / len(rows) / args.answer:.1f} ms a token")


def answered(models, drafts: str, text: str, args) -> tuple[float, list[int], list[int]]:
    """-> CPU seconds, tokens, and those of drafts that were taken and that were not."""
    events = []
    session = Session(Controller(models, Settings(budget=2048, drafts=drafts)), [events.append])
    session.append(session.encode(text)[: args.prompt])
    session.stream.logits()
    began = time.process_time()
    tokens = [piece.token for piece in session.generate(args.answer, Sampling(temperature=args.temperature))]
    seconds = time.process_time() - began
    counts = [event.drafts for event in events if event.drafts]
    return seconds / len(tokens) * args.answer, tokens, [sum(column) for column in zip(*counts, strict=True)] or [0, 0]


if __name__ == "__main__":
    main()
