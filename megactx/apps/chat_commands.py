"""What a line that begins with a slash does in a chat."""

from pathlib import Path

from rich.table import Table

from megactx.memory.prediction import expected
from megactx.runtime import Session
from megactx.runtime.text import printable

from .strip import strip

HELP = "/focus  /tree  /expects  /history [TOKENS]  /save [FOLDER]  /load FOLDER  /help  /quit"
TOP = 8  # entries of a table


def obey(chat, line: str) -> bool:
    """Do it; -> whether the talk goes on.

    Raises:
        ValueError: there is no such command, or it cannot be done.
    """
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        raise ValueError(f"{name}: there is no such command. {HELP}")
    COMMANDS[name](chat, rest.strip())
    return name != "/quit"


def focus(chat, _: str) -> None:
    """What the last refocus saw and did."""
    event, session = chat.last, chat.session
    if event is None:
        chat.say("no refocus yet: it takes 32 tokens")
        return
    view = event.after[0]
    levels = ", ".join(f"{int((view.lod == n).sum()):,} of level {n}" for n in view.lod.unique().tolist())
    chat.say(
        f"refocus {event.number}: {len(view.lod):,} of {event.budget:,} entries ({levels}) for {view.tokens:,} tokens"
    )
    times = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in event.seconds.items() if seconds)
    kept = "" if event.reuse is None else f"; {event.reuse:.0%} of keys and values kept"
    chat.say(f"{times}{kept}")
    if event.scores is None:
        chat.say("no LensNet: the newest text has the detail")
        return
    told = event.telemetry
    chat.say(
        f"price {float(event.scores.price[0]):.4f} nat, {int(told.expands[0])} expands, {int(told.collapses[0])}"
        f" collapses, swap rate {float(told.swap_rate[0]):.2f}"
    )
    table = Table("score", "level", "tokens", "text")
    scored, score = event.scored[0], event.scores.score[0].cpu()
    for column in score.abs().argsort(descending=True)[:TOP].tolist():
        start, width = int(scored.start[column]), int(scored.width[column])
        text = printable(session.text(start, start + min(width, 32)))
        shown = " ".join(text.split())[:70].replace("[", r"\[")
        table.add_row(
            f"{float(score[column]):+.2f}", str(int(scored.lod[column])), f"{start:,} .. {start + width:,}", shown
        )
    chat.console.print(table)


def tree(chat, _: str) -> None:
    """The timeline: levels of the tree, and what the window sees."""
    if chat.session.context is None:
        chat.say("no tree yet: it takes 32 tokens, and megacontext=none has none")
        return
    chat.console.print(strip(chat.session.context, columns=72))


def expects(chat, _: str) -> None:
    """Blocks of the history that are nearest to what the model expects next."""
    session, readout = chat.session, chat.controller.models.prediction
    if readout is None or session.tree is None:
        chat.say("no readout of what comes next, or no tree: see docs/prediction.md")
        return
    session.stream.logits()  # what waits is read
    near = expected(readout, session.tree, session.stream.hidden[0], TOP)
    if not near:
        chat.say("no block yet: it takes 32 tokens")
        return
    table, block = Table("cosine", "tokens", "text"), session.tree.block_size
    for index, cosine in near:
        text = " ".join(printable(session.text(index * block, (index + 1) * block)).split())
        shown = text[:70].replace("[", r"\[")
        table.add_row(f"{cosine:+.2f}", f"{index * block:,} .. {(index + 1) * block:,}", shown)
    chat.console.print(table)


def history(chat, rest: str) -> None:
    """The newest tokens as text."""
    if rest and not rest.isdecimal():
        raise ValueError(f"/history {rest}: a number of tokens is wanted")
    count = int(rest or 200)
    chat.say(chat.session.text(max(0, chat.session.length - count)))


def save(chat, folder: str) -> None:
    """Into a folder, or where it was saved last."""
    where = chat.session.save(folder or None)
    chat.say(f"saved to {where} ({chat.session.length:,} tokens)")


def load(chat, folder: str) -> None:
    """Another session in place of this one, which is saved where it has a folder."""
    if not folder:
        raise ValueError("/load: name a folder")
    own = chat.session.folder
    if own is not None and Path(folder).expanduser().resolve() == own.resolve():
        chat.say(f"the talk is in {folder} already ({chat.session.length:,} tokens)")
        return
    if own is not None:
        chat.session.save()
    session = Session.load(folder, chat.controller, chat.observers)
    chat.session.close()
    chat.session, chat.last = session, None
    chat.say(f"loaded {folder} ({session.length:,} tokens)")


COMMANDS = {
    "/focus": focus,
    "/tree": tree,
    "/expects": expects,
    "/history": history,
    "/save": save,
    "/load": load,
    "/help": lambda chat, _: chat.say(HELP),
    "/quit": lambda chat, _: None,
}
