"""What a session did, as a file: HTML to look into, a PNG of its strips, or a GIF.

The HTML is the page of the live view with everything inside: it needs no server and no network.
"""

import json
from collections.abc import Callable
from pathlib import Path

from megactx.focus.replay import Replay, Step
from megactx.framework.files import write as write_file
from megactx.runtime.text import LONGEST, printable, text_of

from ..pictures import animate_replay, plot_replay
from . import frames
from .player import Player

PAGE = Path(__file__).parent / "page"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
STRIPS = 40  # newest refocuses of a picture: more are too small to be seen
KINDS = (".html", ".png", ".gif")
ELSEWHERE = "give --export a file at another place"


def page(player: Player) -> str:
    """The page with all refocuses that are kept, and all of the text; called in the player's thread."""
    session = player.session
    block, length = session.stream.block, session.length
    ids = session.ids().tolist()
    texts = [
        text_of(session.tokenizer, ids[start : start + block], ids[max(0, start - LONGEST) : start])
        for start in range(0, length, block)
    ]
    data = {
        "about": frames.about(session) | {"live": False},
        "frames": player.feed.frames,
        "state": player.feed.state | {"doing": "replay"},
        "texts": [printable(text) for text in texts],
    }
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    out = []
    for line in html.splitlines():
        name = line.partition("/page/")[2].partition('"')[0]
        content = (PAGE / name).read_text(encoding="utf-8") if name else ""
        if name.endswith(".css"):
            out.append(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>\n{content}</style>')
        elif name.endswith(".js"):
            out.append(f"<script>\n{content}</script>")
        elif name:
            continue  # the icon
        else:
            out.append(line)
    # "<" as an escape: no text can end the element that holds it.
    inside = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    element = f'<script type="application/json" id="replay">{inside}</script>'
    return "\n".join(out).replace("<!-- replay -->", element, 1) + "\n"


def writer(path: str) -> Callable[[Player, list[Step]], None]:
    """What writes such a file.

    Raises:
        ValueError: none that we know, or a folder that is not there: before anything is done.
    """
    target = Path(path).expanduser()
    kind = target.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"--export={path} is not allowed: a file that ends in {', '.join(KINDS)}")
    if not target.absolute().parent.is_dir() or target.is_dir():
        raise ValueError(f"--export={path}: the folder is not there, or the file is a folder")

    def write(player: Player, steps: list[Step]) -> None:
        if kind == ".html":
            return write_file(target, player.ask(lambda: page(player)).result(), ELSEWHERE)
        if not steps:
            raise ValueError(f"--export={path}: LensNet scored no window, so there is nothing to draw; .html shows it")
        if any(step.before.parts for step in steps):
            raise ValueError(f"--export={path}: a picture shows one tree; .html shows parts")
        (plot_replay if kind == ".png" else animate_replay)(target, Replay(steps=steps[-STRIPS:]))

    return write
