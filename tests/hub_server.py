"""A Hub on loopback for tests: the part of the Hub's HTTP protocol that push, pull and load_dataset need, in memory.

Repositories live as long as the server. LFS uploads without Xet; whole-file and ranged downloads; branches are not
modelled beyond `main` and commit hashes. `HF_ENDPOINT`, `HF_HUB_DISABLE_XET=1` and `HF_HOME` have to be set before
huggingface_hub is imported, so clients run as processes of their own (`Hub.run`).
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

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
    """The server and its state: `repositories["model", "user/name"]`, and faults to inject."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.fail_uploads = 0  # refuse so many LFS uploads (a broken connection)
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, kind: str = "model") -> dict[str, bytes]:
        repository = self.repositories[kind, repo_id]
        return repository.commits[repository.head]

    def run(self, code: str, home: Path, token: str | None = TOKEN, path: list[str] | None = None) -> str:
        """Run Python code in a fresh process that talks to this Hub; returns what it printed."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
        environment |= {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        environment |= {"HF_TOKEN": token} if token else {}
        environment |= {"PYTHONPATH": os.pathsep.join(path)} if path else {}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            raise AssertionError(done.stderr[-4000:])
        return done.stdout


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
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
        content = self.body()
        if self.hub.fail_uploads > 0:
            self.hub.fail_uploads -= 1
            return self.reply(403)  # not a code that huggingface_hub retries by itself
        self.hub.lfs[self.path.rsplit("/", 1)[1]] = content
        return self.reply(200)

    def commit(self, kind: str, repo_id: str, body: bytes) -> None:
        repository = self.repository(kind, repo_id)
        if repository is None:
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
