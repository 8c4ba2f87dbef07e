"""What a line that begins with a slash does in a chat."""

from datetime import datetime
from pathlib import Path

from rich.table import Table

from megactx.memory import Composite
from megactx.memory.prediction import expected
from megactx.runtime import Session, Wanted
from megactx.runtime.part_files import conflicts
from megactx.runtime.sources import opened
from megactx.runtime.text import printable

from .command_line import curation_of
from .strip import strip

HELP = (
    "/focus  /tree  /expects  /history [TOKENS]  /parts  /use NAME=PATH[:SHARE]  /drop NAME  /pin NAME  /sources"
    "  /curate [NAME,...]  /restore  /save [FOLDER]  /load FOLDER  /help  /quit"
)
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
    drafts = f"; drafts: {event.drafts[0]} tokens taken, {event.drafts[1]} in vain" if event.drafts else ""
    chat.say(f"{times}{kept}{drafts}")
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
        address, width = int(scored.start[column]), int(scored.width[column])
        text = printable(session.text_at(address, min(width, 32)))
        part, start = session.place(address)
        where = f"{start:,} .. {start + width:,}" + (f" of {part.name}" if part else "")
        shown = " ".join(text.split())[:70].replace("[", r"\[")
        table.add_row(f"{float(score[column]):+.2f}", str(int(scored.lod[column])), where, shown)
    chat.console.print(table)


def tree(chat, _: str) -> None:
    """The timeline: levels of the tree, and what the window sees."""
    if chat.session.context is None:
        chat.say("no tree yet: it takes 32 tokens, and megacontext=none has none")
        return
    context = chat.session.context
    if not isinstance(context.tree, Composite):
        chat.console.print(strip(context, columns=72))
        return
    for name, own in context.tree.alone(context):
        chat.say(name or "(history)")
        chat.console.print(strip(own, columns=72))


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


def curate(chat, rest: str) -> None:
    """Archive now what nobody reads, and go on so; without a name as ``--curation`` says."""
    session = chat.session
    if rest or session.curation is None:
        session.curate(curation_of(rest or "default"))
    freed = session.curate_now()
    chat.say(f"{freed / 1e6:.3f} MB went into the archive; /restore brings them back")


def restore(chat, _: str) -> None:
    """Bring back all that was archived, and archive nothing more in this talk."""
    chat.session.curate(None)
    chat.say(f"{chat.session.restore():,} spans were restored")


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


def parts(chat, _: str) -> None:
    """Other trees in the window, and how much of the budget they have."""
    session = chat.session
    if not session.parts:
        chat.say("no parts: /use NAME=PATH[:SHARE] shows one")
        return
    seen, sizes = session.stream.seen, _sizes(session)
    caps = dict(zip((part.name for part in seen.parts), seen.caps, strict=True)) if seen is not session.tree else {}
    for part in session.parts:
        entries = f"{sizes.get(part.name, 0):,} of {caps.get(part.name, 0):,} entries"
        words = [entries, f"version {part.version}", "pinned" * bool(part.wanted.pinned), "closed" * part.closed]
        words.append(f"licence {part.licence}" if part.licence else "no licence is noted")
        told = ", ".join(word for word in (*words, part.note) if word)
        chat.say(f"{part.name}  {part.wanted.path}  {int(part.tree.lengths[0]):,} tokens, {told}")
    for file, winner, others in conflicts(session.parts):
        chat.say(f"{file} is in {winner} and in {', '.join(others)}: that of {winner} counts, the others stay closed")


def use(chat, rest: str) -> None:
    """Show another tree beside the history, or another version or share of one."""
    wanted = Wanted.parse(rest)
    chat.session.use(wanted)
    part = next(part for part in chat.session.parts if part.name == wanted.name)
    licence = f", licence {part.licence}" if part.licence else ""
    chat.say(f"{part.name}: {int(part.tree.lengths[0]):,} tokens, version {part.version}{licence}")


def drop(chat, name: str) -> None:
    """Show it no more."""
    chat.session.drop(name)
    chat.say(f"{name} is no part any more")


def pin(chat, name: str) -> None:
    """Show no newer version of it."""
    chat.session.pin(name)
    chat.say(f"{name} stays as it is now")


def sources(chat, _: str) -> None:
    """What is read in full, and from which part and file it is."""
    found = opened(chat.session)
    if not found:
        chat.say("no block is read in full yet: it takes 32 tokens, and megacontext=none has none")
        return
    for run in found:
        where = "no file is noted"
        if run.origin is not None:
            at = datetime.fromtimestamp(run.origin.time).strftime("%Y-%m-%d %H:%M") if run.origin.time else ""
            where = f"{run.origin}  {at}".rstrip()
        licence = f"  {run.licence}" if run.licence else ""
        chat.say(f"{run.part or '(history)'}  {where}  tokens {run.start:,} to {run.stop - 1:,}{licence}")


def _sizes(session: Session) -> dict[str, int]:
    """Entries of each part in the window."""
    context, seen = session.context, session.stream.seen
    if context is None or seen is session.tree:
        return {}
    each = [len(lod) for lod, _ in seen.segments(context)[:-1]]
    return {part.name: size for part, size in zip(seen.parts, each, strict=True)}


COMMANDS = {
    "/focus": focus,
    "/tree": tree,
    "/expects": expects,
    "/history": history,
    "/parts": parts,
    "/use": use,
    "/drop": drop,
    "/pin": pin,
    "/sources": sources,
    "/curate": curate,
    "/restore": restore,
    "/save": save,
    "/load": load,
    "/help": lambda chat, _: chat.say(HELP),
    "/quit": lambda chat, _: None,
}
