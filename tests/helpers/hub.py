"""Small model hub on loopback with the repositories, uploads and commits of huggingface_hub."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.serving import make_server

TOKEN = "hf_secret_of_the_test"
_LARGE = (".safetensors",)


@dataclass
class Repository:
    """A repository: the commits of each branch. A commit maps names to files."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])
    branches: dict[str, int] = field(default_factory=lambda: {"main": 0})

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]

    def sha(self, branch: str = "main") -> str:
        return hashlib.sha1(str(self.branches[branch]).encode()).hexdigest()


@dataclass
class Hub:
    """The server's content, and the requests that it received.

    Attributes:
        endpoint: Address of the server.
        repositories: Repositories by owner/name.
        objects: Large files by SHA-256.
        requests: Method, path and Authorization header of each request.
        read_only: Whether every write is refused.
        delay: Delay of each response in seconds.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    read_only: bool = False
    delay: float = 0.0

    def asked(self, part: str, method: str = "POST") -> int:
        """Return the number of requests whose path contains a text."""
        return sum(part in path and method == used for used, path, _ in self.requests)


def client(hub: Hub, folder: Path) -> dict[str, str]:
    """Return the environment in which huggingface_hub uses this hub with its token."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "hub-home"),  # ignores the user's login
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # Xet is a separate storage service
    }


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub on loopback."""
    hub = Hub()
    server = make_server("127.0.0.1", 0, _application(hub), threaded=True)
    hub.endpoint = f"http://127.0.0.1:{server.port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()


def _application(hub: Hub) -> Flask:
    app = Flask("hub")

    @app.before_request
    def _note() -> Any:
        given = request.headers.get("Authorization")
        hub.requests.append((request.method, request.path, given))
        time.sleep(hub.delay)
        if request.path.startswith("/objects/"):
            return None  # a presigned address gets no token
        if given != f"Bearer {TOKEN}":
            return jsonify(error="Invalid username or password."), 401
        if hub.read_only and request.method == "POST":
            return jsonify(error="You don't have the rights to create a model"), 403
        return None

    @app.post("/api/repos/create")
    def _create() -> Any:
        asked: Any = request.get_json()
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{hub.endpoint}/{name}"
        if name in hub.repositories:
            return jsonify(error="You already created this model repo", url=url), 409
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        hub.repositories[name] = Repository(private)
        return jsonify(url=url, name=name, id="1")

    @app.post("/api/models/<owner>/<name>/branch/<branch>")
    def _branch(owner: str, name: str, branch: str) -> Any:
        repository = hub.repositories[f"{owner}/{name}"]
        if branch in repository.branches:
            return jsonify(error="Reference already exists"), 409
        repository.branches[branch] = repository.branches["main"]
        return jsonify({})

    @app.get("/api/models/<owner>/<name>")
    @app.get("/api/models/<owner>/<name>/revision/<branch>")
    def _info(owner: str, name: str, branch: str = "main") -> Any:
        repository = hub.repositories[f"{owner}/{name}"]
        siblings = [{"rfilename": file} for file in repository.files(branch)]
        return jsonify(id=f"{owner}/{name}", sha=repository.sha(branch), siblings=siblings)

    @app.post("/api/validate-yaml")
    def _validate() -> Any:
        return jsonify(errors=[], warnings=[])

    @app.post("/api/models/<owner>/<name>/preupload/<branch>")
    def _preupload(owner: str, name: str, branch: str) -> Any:
        held = hub.repositories[f"{owner}/{name}"].files(branch)
        asked: Any = request.get_json()
        return jsonify(files=[_mode(entry["path"], held) for entry in asked["files"]])

    @app.post("/<owner>/<name>.git/info/lfs/objects/batch")
    def _batch(owner: str, name: str) -> Any:
        asked: Any = request.get_json()
        return jsonify(
            transfer="basic",
            objects=[
                {**entry, **({} if entry["oid"] in hub.objects else _upload_of(hub, entry["oid"]))}
                for entry in asked["objects"]
            ],
        )

    @app.put("/objects/<oid>")
    def _put(oid: str) -> Any:
        body = request.get_data()
        if hashlib.sha256(body).hexdigest() != oid:
            return jsonify(error="another content"), 400
        hub.objects[oid] = body
        return Response(status=200)

    @app.post("/api/models/<owner>/<name>/commit/<branch>")
    def _commit(owner: str, name: str, branch: str) -> Any:
        repository = hub.repositories[f"{owner}/{name}"]
        files = dict(repository.files(branch))
        message = ""
        for line in request.get_data().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        repository.commits.append(files)
        repository.messages.append(message)
        repository.branches[branch] = len(repository.commits) - 1
        url = f"{hub.endpoint}/{owner}/{name}/commit/{repository.sha(branch)}"
        return jsonify(commitUrl=url, commitOid=repository.sha(branch), success=True)

    return app


def _mode(path: str, held: dict[str, bytes]) -> dict[str, Any]:
    large = path.endswith(_LARGE)
    content = held.get(path)
    oid = None
    if content is not None:
        git = b"blob %d\0" % len(content) + content
        oid = (hashlib.sha256(content) if large else hashlib.sha1(git)).hexdigest()
    mode = "lfs" if large else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _upload_of(hub: Hub, oid: str) -> dict[str, Any]:
    return {"actions": {"upload": {"href": f"{hub.endpoint}/objects/{oid}", "header": {}}}}
