"""A Hugging Face Hub on this machine: as much of its protocol as uploads and downloads of models need."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
from huggingface_hub import constants

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """The server; ``repositories`` are {ORG/NAME: {path: content}}, ``requests`` are (method, path, token)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.private, self.requests = {}, set(), []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def revision(self, name):
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

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

    def do_GET(self):
        hub, token = self.server, self.token()
        path = self.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        name = (api or file)[1] if api or file else None
        if name not in hub.repositories or (name in hub.private and token != TOKEN):
            return self.refuse(401 if token != TOKEN else 404, "Repository not found")
        files, sha = hub.repositories[name], hub.revision(name)
        if api and api[2] == "tree":
            listed = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            return self.answer(listed)
        if api:
            siblings = [{"rfilename": p, "size": len(c)} for p, c in files.items()]
            return self.answer(
                {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": [], "private": False}
            )
        if file[2] not in files:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        content = files[file[2]]
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=sha, Accept_Ranges="bytes")

    do_HEAD = do_GET  # noqa: N815


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
