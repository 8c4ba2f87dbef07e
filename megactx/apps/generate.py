"""Continue a prompt of any length, with a window of fixed size.

python -m megactx.apps.generate "Once upon a time"
python -m megactx.apps.generate --file book.txt --tokens 200 --temperature 0.8 --top-p 0.95
cat book.txt | python -m megactx.apps.generate --session FOLDER        goes on where the session stands, and saves
python -m megactx.apps.generate "one prompt" "another"                 a batch, decoded together
"""

import argparse
import sys
from pathlib import Path

import torch

from megactx.data.tokenizer import bos_id
from megactx.framework.command_line import run
from megactx.runtime import Controller, Sampling, Session
from megactx.runtime.controller import decode
from megactx.runtime.session import end_ids
from megactx.runtime.session_files import is_session
from megactx.runtime.text import LONGEST, Answer, StopStrings, encodable, from_bytes, parts_of, printable

from .command_line import add_talk, controller_of, observers_of, prompt_file_of, sampling_of, talk_of

PIECE = 2**16  # characters of a prompt that are read at a time


def generate(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: a setting that is not allowed, or a prompt that is not text.
    """
    sampling, prompts = sampling_of(args), _prompts(args)
    StopStrings(args.stop)  # refuses stop strings before anything is loaded
    controller = controller_of(args)
    observers = observers_of(args, controller)
    if len(prompts) > 1:
        for prompt, answer in zip(
            prompts, answers(controller, prompts, args.tokens, sampling, args.stop, observers), strict=True
        ):
            print(printable(f"{prompt}{answer}"), end="\n\n")
        return
    with talk_of(args, controller, observers) as session:
        try:
            _read(session, prompts[0])
            for piece in session.generate(args.tokens, sampling, args.stop):
                print(printable(piece.text), end="", flush=True)
            print()
        finally:
            if args.session:
                session.save()


def _read(session: Session, text: str) -> None:
    """Take up a prompt, a long one part by part: Ctrl-C keeps what was read."""
    done, read = 0, "read and kept" if session.folder else "read"
    for part in parts_of(text, PIECE):
        session.append(part)
        done += len(part)
        if len(text) > PIECE:
            print(f"{done:,} of {len(text):,} characters {read}", file=sys.stderr, flush=True)


def answers(
    controller: Controller, prompts: list[str], max_tokens: int, sampling: Sampling, stop: list[str], observers=()
) -> list[str]:
    """Continuations of texts, decoded as one batch."""
    base = controller.models.base
    rows = [
        [bos_id(base.tokenizer), *base.tokenizer(encodable(text), add_special_tokens=False, verbose=False)["input_ids"]]
        for text in prompts
    ]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for row, own in enumerate(rows):
        ids[row, : len(own)] = torch.tensor(own)
    stream = controller.stream(len(rows), observers=observers)
    stream.append(ids, lengths)
    told = [Answer(base.tokenizer, end_ids(base), stop, own[-LONGEST:]) for own in rows]
    texts = [""] * len(rows)

    def over(row: int, token: int) -> bool:
        texts[row] += told[row].push(token)
        return told[row].stopped is not None

    for _ in decode(stream, max_tokens, sampling, over):
        pass
    return [text + answer.rest() for text, answer in zip(texts, told, strict=True)]


def _prompts(args: argparse.Namespace) -> list[str]:
    if (text := prompt_file_of(args)) is not None:
        return [text]
    if len(args.prompt) > 1 and args.session:
        raise ValueError("a session has one history: give one prompt with --session")
    if len(args.prompt) > 1 and (args.part or args.preset):
        raise ValueError("parts stand beside one history: give one prompt with --part or --preset")
    if args.prompt:
        return [encodable(prompt) for prompt in args.prompt]
    text = "" if sys.stdin.isatty() else from_bytes(sys.stdin.buffer.read(), "stdin")
    if not text and not (args.session and is_session(Path(args.session).expanduser())):
        raise ValueError("stdin is empty, there is nothing to continue: give a prompt, --file, or a session with text")
    return [text]


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.apps.generate", description=__doc__.split("\n")[0])
    parser.add_argument("prompt", nargs="*", help="text; several are decoded as a batch; none: --file, or stdin")
    parser.add_argument("--file", help="a text file as the prompt")
    parser.add_argument("--stop", nargs="+", default=[], metavar="STRING", help="strings that end an answer")
    add_talk(parser, tokens=128)
    return run(generate, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
