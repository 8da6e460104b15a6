"""
A Hub on loopback for tests: the part of the Hub's HTTP protocol that push, pull and load_dataset need, in memory. Or
the real one.

Repositories on the loopback Hub live as long as the server. LFS uploads without Xet; whole-file and ranged downloads;
branches are not modelled beyond `main` and commit hashes. `HF_ENDPOINT`, `HF_HUB_DISABLE_XET=1` and `HF_HOME` have to
be set before huggingface_hub is imported, so clients run as processes of their own (`Hub.run`).

    python tests/hub_server.py    # serves until interrupted; prints its address
"""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi

TOKEN = "hf_test_token"


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}  # hash -> path -> content, oldest first
        self.commit({})

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[name] = files
        return name

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def resolve(self, revision: str) -> str | None:
        return self.head if revision == "main" else revision if revision in self.commits else None


class Hub:
    """
    A Hub at `endpoint` where `token` may write, and client processes that talk to it. `name` gives repository names;
    `close` deletes what they name.
    """

    def __init__(self, endpoint: str, token: str, prefix: str = ""):
        self.endpoint, self.token, self.prefix = endpoint, token, prefix
        self.names: list[str] = []
        self.user = HfApi(endpoint, token).whoami()["name"]

    def name(self, name: str) -> str:
        self.names.append(f"{self.user}/{self.prefix}{name}")
        return self.names[-1]

    def files(self, repo_id: str, kind: str = "model") -> dict[str, bytes]:
        """Everything on the repository's main branch."""
        api = HfApi(self.endpoint, self.token)
        with tempfile.TemporaryDirectory() as folder:
            for path in (names := api.list_repo_files(repo_id, repo_type=kind)):
                api.hf_hub_download(repo_id, path, repo_type=kind, cache_dir=f"{folder}/cache", local_dir=folder)
            return {path: Path(folder, path).read_bytes() for path in names}

    def start(self, code: str, home: Path, token: str | None = "") -> subprocess.Popen:
        """Python code in a fresh process that talks to this Hub; by default with the token."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
        environment |= {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        environment |= {"PYTHONPATH": str(Path(__file__).parent.parent)}
        if token is not None:
            environment |= {"HF_TOKEN": token or self.token}
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, code: str, home: Path, token: str | None = "") -> str:
        """Run such a process to its end; returns what it printed."""
        process = self.start(code, home, token)
        printed, errors = process.communicate(timeout=600)
        if process.returncode:
            raise AssertionError(errors[-4000:])
        return printed

    def close(self) -> None:
        api = HfApi(self.endpoint, self.token)
        for name in dict.fromkeys(self.names):
            for kind in ("model", "dataset"):
                api.delete_repo(name, repo_type=kind, missing_ok=True)


class LoopbackHub(Hub):
    """The server, its state `repositories["model", "user/name"]`, and faults to inject."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.fault: tuple[str, str] | None = None  # next "PUT" or "commit"; "drop" it, or "stall" until the client dies
        self.stalled = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        super().__init__(f"http://127.0.0.1:{self.server.server_port}", TOKEN)

    def files(self, repo_id: str, kind: str = "model") -> dict[str, bytes]:
        repository = self.repositories[kind, repo_id]
        return repository.commits[repository.head]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients are killed on purpose
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content_Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def repository(self, kind: str, repo_id: str) -> Repository | None:
        found = self.hub.repositories.get((kind, repo_id))
        allowed = found and (not found.private or self.headers.get("Authorization") == f"Bearer {TOKEN}")
        if not allowed:
            self.fail(401 if not self.headers.get("Authorization") else 404, "RepoNotFound", "Repository not found")
            return None
        return found

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def fails(self, place: str) -> bool:
        """Whether the request at this place is to fail now. Then the connection is gone when this returns."""
        if self.hub.fault is None or self.hub.fault[0] != place:
            return False
        (_, kind), self.hub.fault = self.hub.fault, None
        if kind == "stall":
            self.hub.stalled.set()
            while self.rfile.read(2**16):
                pass
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return True

    # -------------------------------------------------------------------------------------------------- writing

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.fail(401, "Unauthorized", "Invalid credentials")
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            kind = wanted.get("type") or "model"
            repo_id = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
            exists = (kind, repo_id) in self.hub.repositories
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.repositories.setdefault((kind, repo_id), Repository(bool(private)))
            prefix = "datasets/" if kind == "dataset" else ""
            answer = {"url": f"{self.hub.endpoint}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}
            self.reply(409 if exists else 200, answer)
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/(\w+)s/([^/]+/[^/]+)/preupload/(.+)", path):
            large = (".safetensors", ".parquet", ".png", ".jpg", ".bin")
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.reply(200, {"files": files})
        elif match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.reply(200, {"transfer": "basic", "objects": [self.lfs_answer(o) for o in json.loads(body)["objects"]]})
        elif match := re.fullmatch(r"/api/(\w+)s/([^/]+/[^/]+)/commit/(.+)", path):
            self.commit(match[1], match[2], body)
        else:
            self.reply(404)

    def lfs_answer(self, wanted: dict) -> dict:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in self.hub.lfs:
            answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
        return answer

    def do_PUT(self):
        length = int(self.headers["Content-Length"])
        half = self.rfile.read(length // 2)
        if self.fails("PUT"):
            return
        self.hub.lfs[self.path.rsplit("/", 1)[1]] = half + self.rfile.read(length - len(half))
        self.reply(200)

    def do_DELETE(self):
        wanted = json.loads(self.body())
        kind, repo_id = wanted.get("type") or "model", f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if self.repository(kind, repo_id):
            del self.hub.repositories[kind, repo_id]
            self.reply(200)

    def commit(self, kind: str, repo_id: str, body: bytes) -> None:
        repository = self.repository(kind, repo_id)
        if repository is None or self.fails("commit"):
            return
        files = dict(repository.commits[repository.head])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif entry["key"] == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
        name = repository.commit(files)
        self.reply(
            200, {"commitOid": name, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{name}", "hookOutput": ""}
        )

    # -------------------------------------------------------------------------------------------------- reading

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            self.reply(200, {"name": "user", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        elif match := re.fullmatch(r"/api/(\w+)s/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if repository := self.repository(match[1], match[2]):
                self.describe(repository, match[2], match[3] or "main")
        elif match := re.fullmatch(r"/api/(\w+)s/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            if repository := self.repository(match[1], match[2]):
                self.tree(repository, match[3], match[4] or "")
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if repository := self.repository("dataset" if match[1] else "model", match[2]):
                self.download(repository, match[3], match[4])
        else:
            self.reply(404)

    def describe(self, repository: Repository, repo_id: str, revision: str) -> None:
        name = repository.resolve(revision)
        if name is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": path} for path in repository.commits[name]]
        information = {"id": repo_id, "sha": name, "private": repository.private, "siblings": siblings, "tags": []}
        return self.reply(200, information | {"downloads": 0, "likes": 0, "gated": False, "disabled": False})

    def tree(self, repository: Repository, revision: str, folder: str) -> None:
        name = repository.resolve(revision)
        if name is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[name]
        inside = {path: data for path, data in files.items() if not folder or path.startswith(folder.rstrip("/") + "/")}
        if folder and not inside:
            return self.fail(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in inside.items()
        ]
        folders = {path.rsplit("/", depth)[0] for path in inside for depth in range(1, path.count("/") + 1)}
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        if "recursive=true" not in self.path.lower():
            depth = folder.count("/") + 1 if folder else 0
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        return self.reply(200, entries)

    def download(self, repository: Repository, revision: str, path: str) -> None:
        name = repository.resolve(revision)
        if name is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        data = repository.commits[name].get(path)
        if data is None:
            return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=name)
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": tag, "X_Repo_Commit": name, "X_Linked_Etag": tag, "X_Linked_Size": len(data)}
        headers |= {"Accept_Ranges": "bytes", "Content_Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.reply(206, data[start : end + 1], **headers)
        return self.reply(200, data, **headers)


if __name__ == "__main__":
    print(f"{LoopbackHub().endpoint}, token {TOKEN}", flush=True)
    threading.Event().wait()
