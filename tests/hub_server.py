"""A Hugging Face Hub on this machine: as much of its protocol as up- and downloads of models and data sets need."""

import base64
import hashlib
import json
import re
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote

import huggingface_hub
from huggingface_hub import constants

TOKEN = "hf_of_the_test"
NAME = "((?:datasets/)?[^/]+/[^/]+)"  # of a repository, in an address


class Hub(ThreadingHTTPServer):
    """The server.

    ``repositories`` are {ORG/NAME: {path: content}}, with datasets/ORG/NAME for data sets and @REVISION behind the name
    for another revision than main; ``requests`` are (method, path, token), ``sent`` is {path: bytes of its content}.
    ``fault(path, count)`` is asked before the answer number ``count`` for a file: a status, a share of the bytes after
    which the connection ends, or None. Without ``ranges`` files are sent whole.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.private, self.requests = {}, set(), []
        self.sent, self.fault, self.ranges = Counter(), lambda path, count: None, True
        self._counts = Counter()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def revision(self, name):
        files = sorted(self.repositories[name].items())
        return digest(repr([(path, digest(content)) for path, content in files]).encode())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and content are two writes, of which the second would wait

    def log_message(self, *_):
        pass

    def answer(self, content, code=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def token(self):
        found = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.requests.append((self.command, self.path, found))
        return found

    def refuse(self, code, message, name="RepoNotFound"):
        self.answer({"error": message}, code, X_Error_Code=name, X_Error_Message=message)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, token = self.server, self.token()
        if "/paths-info/" in self.path:
            return self.paths_info(body)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if token != TOKEN:
            return self.refuse(401, "Invalid username or password.", "")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            hub.repositories.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(name)
            return self.answer({"url": f"{hub.address}/{name}"})
        name, verb = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/main", self.path.partition("?")[0]).groups()
        if verb == "preupload":
            asked = json.loads(body)["files"]
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return self.answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        sha = hub.revision(name)
        return self.answer({"commitUrl": f"{hub.address}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def paths_info(self, body):
        """What a data set has at some paths, for ``do_POST``."""
        found = re.fullmatch(rf"/api/{NAME}/paths-info/([^/]+)", self.path)
        name, paths = self.revised(found[1], found[2]), parse_qs(body.decode())["paths"]
        if name is None:
            return self.refuse(401, "Repository not found")
        return self.answer([one for one in listed(self.server.repositories[name], "") if one["path"] in paths])

    def revised(self, name, revision):
        """The key of a repository at a revision, which may be its digest; None if this token may not see it."""
        hub, token = self.server, self.headers.get("Authorization", "").removeprefix("Bearer ")
        if name in hub.private and token != TOKEN:
            return None
        keys = [key for key in hub.repositories if key.partition("@")[0] == name]
        wanted = {key: {hub.revision(key), key.partition("@")[2] or "main"} for key in keys}
        return next((key for key in keys if unquote(revision or "main") in wanted[key]), None)

    def do_GET(self):
        hub, token = self.server, self.token()
        path = self.path.partition("?")[0]
        api = re.fullmatch(
            r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?/?", path
        )
        file = re.fullmatch(rf"/{NAME}/resolve/([^/]+)/(.+)", path)
        if not (api or file):
            return self.refuse(404, "Entry not found", "EntryNotFound")
        name = self.revised(api[1], api[3]) if api else self.revised(file[1], file[2])
        if name is None and api and api[1] in hub.repositories and token == TOKEN:
            return self.refuse(404, "Revision not found", "RevisionNotFound")
        if name not in hub.repositories or (name in hub.private and token != TOKEN):
            return self.refuse(401 if token != TOKEN else 404, "Repository not found")
        files, sha = hub.repositories[name], hub.revision(name)
        if api and api[2] == "tree":
            return self.answer(listed(files, unquote(api[4] or ""), "recursive=true" in self.path.lower()))
        if api:
            siblings = [{"rfilename": p, "size": len(c)} for p, c in files.items()]
            about = {
                "id": api[1].removeprefix("datasets/"),
                "sha": sha,
                "siblings": siblings,
                "tags": [],
                "private": False,
            }
            return self.answer(about | {"modelId": api[1]})
        file = unquote(file[3])
        if file not in files:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        content, headers = files[file], {"X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        headers["ETag"] = f'"{digest(content)}"'
        if self.command == "HEAD":
            return self.answer(content, **headers)
        hub._counts[file] += 1
        fault, code = hub.fault(file, hub._counts[file]), 200
        if isinstance(fault, int):
            return self.refuse(fault, "fault of the test", "")
        if hub.ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
            start, end, code = int(asked[1]), int(asked[2]) + 1, 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            content = content[start:end]
        hub.sent[file] += len(content)
        if isinstance(fault, float):
            headers["Content-Length"] = str(len(content))
            content, self.close_connection = content[: int(fault * len(content))], True
        return self.answer(content, code, **headers)

    do_HEAD = do_GET  # noqa: N815


@lru_cache(maxsize=512)
def digest(content):
    return hashlib.sha1(content).hexdigest()


def listed(files, folder, recursive=True):
    """The entries of a folder, as the Hub gives them."""
    found = {}
    for path, content in files.items():
        if folder and not path.startswith(f"{folder}/"):
            continue
        inside = path[len(folder) + 1 if folder else 0 :].split("/")
        for depth in range(1, len(inside)):
            parent = "/".join([folder, *inside[:depth]] if folder else inside[:depth])
            if depth == 1 or recursive:
                found[parent] = {
                    "type": "directory",
                    "path": parent,
                    "size": 0,
                    "oid": digest(parent.encode()),
                }
        if len(inside) == 1 or recursive:
            found[path] = {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
    return list(found.values())


@contextmanager
def serving(monkeypatch, cache):
    """Context: huggingface_hub speaks to a hub of its own, without any token of this machine."""
    hub = Hub()
    Thread(target=hub.serve_forever, daemon=True).start()
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"), "HF_HUB_DISABLE_XET": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert huggingface_hub.get_token() is None
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
