#!/usr/bin/env bash
# fsspec 2026.9.0, HTTPFileSystem.cat_file(url, start, end): where a server ignores the Range header and answers 200 with
# the whole file, as Python's own http.server does, all of it is returned, without an error or a warning. A reader of
# byte ranges that does not compare lengths takes the first bytes of the file for those that it asked for.
# Seen: 100,000 bytes where 10 were asked for; the first ten are those of the file's start. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check 'fsspec==2026.9.0' 'aiohttp==3.14.5'
"$folder/venv/bin/python" - "$folder" <<'PY'
import functools
import http.server
import pathlib
import sys
import threading

import fsspec

folder = pathlib.Path(sys.argv[1]) / "www"
folder.mkdir()
content = bytes(i // 400 for i in range(100_000))
(folder / "pages.bin").write_bytes(content)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
threading.Thread(target=server.serve_forever, daemon=True).start()
files = fsspec.filesystem("http")
found = files.cat_file(f"http://127.0.0.1:{server.server_port}/pages.bin", start=50_000, end=50_010)
print(f"asked for 10 bytes from 50,000 on, got {len(found):,}; the first of them is {found[0]}, wanted {content[50_000]}")
assert len(found) == 100_000 and found == content, "fsspec looks at the answer's status or length now"
PY
