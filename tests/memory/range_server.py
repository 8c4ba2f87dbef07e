"""A web server of files that answers ranges, and can be told to do worse."""

import re
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Ranges(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, Path(self.translate_path(self.path))
        server.asked.append((path.name, self.headers.get("Range")))
        if (status := server.status.get(path.name.partition("-")[0])) is not None:
            return self.send_error(status)
        if server.dies is not None and path.name.startswith("pages"):
            server.dies -= 1
            if server.dies < 0:
                self.close_connection = True
                return None
        if not path.is_file():
            return self.send_error(404)
        content, code = path.read_bytes(), 200
        if server.ranges and (found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
            if int(found[1]) >= len(content):
                return self.send_error(416)
            content, code = content[int(found[1]) : int(found[2]) + 1], 206
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """``asked``: names and ranges so far; ``ranges``: whether they are answered; ``status`` by the first word of a
    name; ``dies``: after so many pages it only hangs up."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(Ranges, directory=str(folder)))
        self.asked, self.ranges, self.status, self.dies = [], True, {}, None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def pages(self) -> list:
        return [each for each in self.asked if each[0].startswith("pages")]


@contextmanager
def serving(folder: Path):
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
