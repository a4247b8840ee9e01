"""A small server that speaks as the Hugging Face hub does, for tests/checkpoints/test_fetch.py."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from headway.checkpoints.fetch import MANIFEST

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder but the manifest."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


class FakeHub(ThreadingHTTPServer):
    """Repository o/r as the hub serves it. `lfs` files are redirected to `cdn`, as there.

    Attributes:
        cuts: the next answers with a file's content end after so many bytes. chunked: they do not say their size.
        listing: sent instead of the list of files. extra: more entries in it. says_lfs, says_size: whether it holds
            sha256 and sizes.
        codes: path -> status. moved: path -> where to. seen: (path, headers) of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.lfs: set[str] = set()
        self.cdn: FakeHub | None = None
        self.cuts: list[int] = []
        self.listing: bytes | None = None
        self.codes: dict[str, int] = {}
        self.moved: dict[str, str] = {}
        self.extra: list[dict] = []
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.says_lfs, self.says_size, self.chunked = True, True, False
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is no news."""

    @property
    def paths(self) -> list[str]:
        return [path.rpartition("/")[2] for path, _ in self.seen if "/resolve/" in path or path.startswith("/blob/")]

    def entries(self) -> list[dict]:
        out = []
        for name, data in self.files.items():
            entry: dict = {"rfilename": name, "blobId": "0" * 40}
            entry |= {"size": len(data)} if self.says_size else {}
            if name in self.lfs and self.says_lfs:
                entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 130}
            out.append(entry)
        return out + self.extra


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        hub.seen.append((self.path, dict(self.headers)))
        place = self.path.partition("?")[0]
        if place in hub.codes:
            return self.answer(hub.codes[place], b"<html>no</html>", {})
        if place in hub.moved:
            return self.answer(302, b"", {"Location": hub.moved[place]})
        if place.startswith("/api/models/o/r"):
            body = {"id": "o/r", "sha": COMMIT, "tags": ["x", "license:apache-2.0"], "siblings": hub.entries()}
            return self.answer(200, hub.listing or json.dumps(body).encode(), {"Content-Type": "application/json"})
        found = re.fullmatch(rf"/o/r/resolve/(?:{COMMIT}|main)/(.+)|/blob/(.+)", place)
        name = found and (found[1] or found[2])
        if not name or name not in hub.files:
            return self.answer(404, b"", {})
        data = hub.files[name]
        headers = {"ETag": f'"{sha256(data)[:40]}"', "X-Repo-Commit": COMMIT}
        if name in hub.lfs:
            headers["X-Linked-ETag"], headers["X-Linked-Size"] = f'"{sha256(data)}"', str(len(data))
            if hub.cdn:
                return self.answer(302, b"elsewhere", {**headers, "Location": f"{hub.cdn.url}/blob/{name}?sign=x"})
        self.content(data, headers)

    def content(self, data: bytes, headers: dict[str, str]) -> None:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"] else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(206 if start else 200, data[start:], headers, self.server.cuts)

    def answer(self, code: int, data: bytes, headers: dict[str, str], cuts: list[int] | None = None) -> None:
        self.send_response(code)
        chunked = self.server.chunked and cuts is not None
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(data)))))
        self.end_headers()
        if self.command == "HEAD":
            return
        if chunked:
            data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
        if cuts:
            data = data[: cuts.pop(0)]
            self.close_connection = True
        self.wfile.write(data)
