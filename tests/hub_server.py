"""A server on loopback that speaks as much of the Hub's API as creating, committing to and reading a model repository
takes.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


class Hub:
    """Repositories in memory: name -> {path: bytes}; `commits` lists the messages."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str]] = []
        self.address = ""

    def sha(self, repo: str) -> str:
        return hashlib.sha1(f"{repo}{len(self.commits)}".encode()).hexdigest()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def answer(self, status: int, content=None, headers: dict[str, str] | None = None) -> None:
            body = (
                content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
            )
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline().strip(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            path, body = unquote(urlparse(self.path).path), self.body()
            if path == "/api/repos/create":
                told = json.loads(body)
                repo = f"{told.get('organization') or 'somebody'}/{told['name']}"
                hub.files.setdefault(repo, {".gitattributes": b""})
                self.answer(200, {"url": f"{hub.address}/{repo}", "id": repo, "name": repo})
            elif "/preupload/" in path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.answer(200, {"files": files})
            elif "/commit/" in path:
                repo = path.removeprefix("/api/models/").split("/commit/")[0]
                lines = [json.loads(line) for line in body.splitlines() if line]
                for line in lines:
                    if line["key"] == "header":
                        hub.commits.append((repo, line["value"]["summary"]))
                    elif line["key"] == "file":
                        hub.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                oid = hub.sha(repo)
                self.answer(
                    200,
                    {
                        "success": True,
                        "commitOid": oid,
                        "commitUrl": f"{hub.address}/{repo}/commit/{oid}",
                        "hookOutput": "",
                    },
                )
            elif path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            else:
                self.answer(404, {"error": path})

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            if path == "/api/whoami-v2":
                self.answer(
                    200, {"name": "somebody", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
                )
            elif path.startswith("/api/models/"):
                repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
                if repo not in hub.files:
                    self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                    return
                siblings = [{"rfilename": name} for name in hub.files[repo]]
                self.answer(
                    200,
                    {
                        "id": repo,
                        "modelId": repo,
                        "sha": hub.sha(repo),
                        "private": False,
                        "tags": [],
                        "siblings": siblings,
                    },
                )
            elif "/resolve/" in path:
                repo, rest = path.strip("/").split("/resolve/")
                content = hub.files.get(repo, {}).get(rest.split("/", 1)[1])
                if content is None:
                    self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                    return
                headers = {
                    "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                    "X-Repo-Commit": hub.sha(repo),
                    "Content-Type": "application/octet-stream",
                }
                self.answer(200, content, headers)
            else:
                self.answer(404, {"error": path})

        do_HEAD = do_GET

    return Handler


@contextmanager
def serve():
    """The hub and its address, while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()


def run_against(script: str, address: str, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A Python script in a process of its own, for which the server is the Hub."""
    environment = os.environ | {
        "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_of_a_test", "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment)
