"""A hub on this computer that takes uploads: what the real client asks of huggingface.co, kept in memory."""

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


class UploadHub(http.server.ThreadingHTTPServer):
    """Repositories by name: whether private, and their files. `refuses` answers that many commits with 403."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}  # of large files, by sha256
        self.sent: list[str] = []  # sha256 of each large file that arrived
        self.refuses = 0
        self.token: str | None = "hf_secret"  # None: every token is refused
        self.seen: list[str] = []  # method and path of each request

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def write(self, name: str, folder: Path) -> Path:
        """Write the files of a repository into a folder, as a download does."""
        for path, content in self.files[name].items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    """Yield a running hub."""
    server = UploadHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: UploadHub

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        words = self._words()
        if words[:2] == ["api", "models"] and len(words) >= 4:
            name = "/".join(words[2:4])
            if name not in self.server.private:
                return self._say(404, {}, {"X-Error-Code": "RepoNotFound"})
            if words[4:5] == ["tree"]:
                files = self.server.files.get(name, {})
                return self._say(
                    200, [{"type": "file", "path": path, "size": len(files[path]), "oid": COMMIT} for path in files]
                )
            return self._say(200, {"id": name, "sha": COMMIT, "private": self.server.private[name], "siblings": []})
        return self._say(404, {})

    def do_POST(self) -> None:
        body, words = self._body(), self._words()
        if self.server.token is None or self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._say(401, {"error": "Invalid username or password."})
        if words == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if words[:2] == ["api", "validate-yaml"]:
            return self._say(200, {"errors": [], "warnings": []})
        if words[4:5] == ["preupload"]:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False} for file in files]
            return self._say(200, {"files": modes})
        if words[-3:] == ["lfs", "objects", "batch"]:
            return self._say(200, {"objects": [self._object(each) for each in json.loads(body)["objects"]]})
        if words[4:5] == ["commit"]:
            return self._commit("/".join(words[2:4]), [json.loads(line) for line in body.splitlines() if line])
        return self._say(200, {})

    def do_PUT(self) -> None:
        sha256, body = self._words()[-1], self._body()
        assert hashlib.sha256(body).hexdigest() == sha256
        self.server.blobs[sha256] = body
        self.server.sent.append(sha256)
        return self._say(200, {})

    def _create(self, values: dict[str, Any]) -> None:
        name = f"{values['organization']}/{values['name']}" if values.get("organization") else f"me/{values['name']}"
        if name in self.server.private:
            return self._say(
                409, {"error": "You already created this model repo", "url": f"{self.server.address}/{name}"}
            )
        self.server.private[name] = values.get("visibility") == "private" or values.get("private") is True
        return self._say(200, {"url": f"{self.server.address}/{name}"})

    def _object(self, each: dict[str, Any]) -> dict[str, Any]:
        """Return where a large file goes; nowhere if it is there."""
        if each["oid"] in self.server.blobs:
            return {"oid": each["oid"], "size": each["size"]}
        return {**each, "actions": {"upload": {"href": f"{self.server.address}/put/{each['oid']}", "header": {}}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        if self.server.refuses:
            self.server.refuses -= 1
            return self._say(403, {"error": "You have exceeded your storage."})
        files = self.server.files.setdefault(name, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.server.address}/{name}/commit/{COMMIT}"
        return self._say(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})

    def _words(self) -> list[str]:
        self.server.seen.append(f"{self.command} {self.path}")
        return self.path.split("?")[0].strip("/").split("/")

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _say(self, code: int, value: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
