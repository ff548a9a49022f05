"""A stand-in for the W&B server on the loopback: it answers what wandb asks for a run, and keeps what arrives.

`with Server() as server:` serves at `server.url`. A mode breaks it: "refuse" has a closed port, "hang" never answers,
"garbage" answers with something that is not JSON, "empty" with JSON that says nothing (wandb-core crashes on it),
"error" with 500, "denied" with 401; `break_after(operation, mode)` does so once the GraphQL `operation` has been
answered.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

_OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, mode: str = "ok") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mode = mode
        self.break_on: tuple[str, str] | None = None
        self.asked = threading.Event()
        self.closing = threading.Event()
        self.operations: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}  # by id: the variables of UpsertBucket
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_codes: list[int] = []
        self.files: dict[str, bytes] = {}  # by path
        self.artifacts: dict[str, dict[str, Any]] = {}  # by name: the input of CreateArtifact
        self.committed: list[str] = []
        self.views: dict[str, dict[str, Any]] = {}  # by id: the variables of UpsertView2

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def break_after(self, operation: str, mode: str) -> None:
        self.break_on = (operation, mode)

    def __enter__(self) -> "Server":
        if self.mode == "refuse":
            self.server_close()
            return self
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        if self.mode != "refuse":
            self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if not self._broken():
            self._send(404, b"{}")

    def do_PUT(self) -> None:
        body = self._body()
        if not self._broken():
            self.server.files[self.path] = body
            self._send(200, b"")

    def do_POST(self) -> None:
        body = self._body()
        if self._broken():
            return
        if self.path.endswith("/file_stream"):
            self._keep_stream(json.loads(body))
            self._send(200, b"{}")
        elif self.path.endswith("/graphql"):
            self._answer_graphql(json.loads(body))
        else:
            self._send(404, b"{}")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _broken(self) -> bool:
        self.server.asked.set()
        match self.server.mode:
            case "ok":
                return False
            case "hang":
                self.server.closing.wait()
                self.close_connection = True
            case "garbage":
                self._send(200, b"<html>not JSON \x00{", "text/html")
            case "empty":
                self._send(200, b'{"data": {}}')
            case "error":
                self._send(500, b'{"errors": [{"message": "down"}]}')
            case "denied":
                self._send(401, b'{"errors": [{"message": "permission denied"}]}')
        return True

    def _keep_stream(self, content: dict[str, Any]) -> None:
        files = content.get("files") or {}
        self.server.history += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.server.summary = json.loads(line)
        if content.get("complete"):
            self.server.exit_codes.append(content["exitcode"])

    def _answer_graphql(self, request: dict[str, Any]) -> None:
        found = _OPERATION.search(request["query"])
        operation = found.group(1) if found else ""
        answer = getattr(self, f"_{operation}", None)
        data = answer(request.get("variables") or {}) if answer else {}
        self._send(200, json.dumps({"data": data}).encode())
        self.server.operations.append(operation)
        if self.server.break_on and self.server.break_on[0] == operation:
            self.server.mode = self.server.break_on[1]

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "u", "entity": "team", "username": "user", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    _GetDefaultEntity = _Viewer

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.server.runs.setdefault(variables["name"], {})
        run.update({key: value for key, value in variables.items() if value is not None})
        project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "team"}}
        bucket = {"id": "b", "name": variables["name"], "displayName": run.get("displayName"), "project": project}
        return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.server.url}/file/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["input"]["artifactCollectionName"]
        self.server.artifacts[name] = variables["input"]
        artifact = {"id": name, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.server.url}/manifest/{variables['artifactID']}"
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": _file(id="f", uploadUrl=url)}}}

    def _CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            _file(
                storagePath=file["name"],
                uploadUrl=f"{self.server.url}/artifact/{file['name']}",
                uploadMultipartUrls=None,
                artifact={"id": file["artifactID"]},
            )
            for file in variables["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _UpsertView2(self, variables: dict[str, Any]) -> dict[str, Any]:
        identifier = variables.get("id") or f"view-{len(self.server.views) + 1}"
        self.server.views[identifier] = variables
        return {"upsertView": {"view": {"id": identifier, "name": variables["name"]}, "inserted": True}}

    def _View(self, variables: dict[str, Any]) -> dict[str, Any]:
        found = [
            {"node": {"id": identifier, "displayName": view["displayName"], "spec": view["spec"]}}
            for identifier, view in self.server.views.items()
            if variables["viewName"] in view["name"]
        ]
        return {"project": {"allViews": {"edges": found}}}

    def _CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.server.committed.append(variables["artifactID"])
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}


def _file(**values: Any) -> dict[str, Any]:
    return {"uploadHeaders": [], **values}


def use(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs go to `server`."""
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
