"""A resumed run and a server of Weights & Biases: the real client, and a stand-in for the server."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from inl_core.recipe.load import dump_recipe
from inl_core.training.metrics import cut_metrics

PROJECT = Path(__file__).parents[2]
SESSION = """
import sys
from pathlib import Path
from inl_core.recipe.load import load_recipe
from inl_core.training.metrics import MetricsWriter

writer = MetricsWriter(Path("run"), load_recipe(Path("recipe.yaml")), sys.exit)
writer.open_mirrors()
for step in map(int, sys.argv[2:]):
    writer.write({"step": step, "loss": step + float(sys.argv[1])})
writer.close_mirrors()
"""


class Server(ThreadingHTTPServer):
    """What the client needs of the server: it keeps what it is told of one run."""

    history: list[dict[str, Any]]
    runs: list[dict[str, Any]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data that a query in GraphQL asks for; nothing for those that may fail."""
        entity = {"id": "e", "name": "team"}
        found = re.search(r"(?:query|mutation) (\w+)", query)
        match found and found[1]:
            case "Viewer":
                return {"viewer": {"id": "v", "entity": "team", "username": "user", "flags": "{}"}}
            case "RunResumeStatus":
                return {"model": {"id": "p", "name": "p", "entity": entity, "bucket": self.resumable()}}
            case "UpsertBucket":
                self.runs.append(variables)
                made = {"id": "r", "name": variables["name"], "project": {"id": "p", "name": "p", "entity": entity}}
                return {"upsertBucket": {"bucket": made, "inserted": True}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/file"} for name in variables["files"]]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def resumable(self) -> dict[str, Any] | None:
        """The run as a client learns of it that may go on with it."""
        if not self.history:
            return None
        last = json.dumps(self.history[-1])
        counts = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps([last]), "eventsTail": "[]", "summaryMetrics": last}
        return counts | tails | {"id": "r", "name": "run", "config": "{}", "wandbConfig": '{"t": {}}', "tags": []}

    def keep(self, files: dict[str, Any]) -> None:
        """Rows of the run's history, from a place in it on."""
        if rows := files.get("wandb-history.jsonl"):
            start = rows["offset"]
            self.history[start : start + len(rows["content"])] = map(json.loads, rows["content"])


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        reply: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            reply = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.keep(json.loads(body).get("files") or {})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    do_GET = do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Answers) as server:
        server.history, server.runs = [], []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.slow
def test_the_server_gets_each_step_once_and_no_step_that_it_has(make_recipe, tmp_path: Path, server: Server) -> None:
    logging = {"wandb": True, "wandb_entity": "team", "wandb_group": "g", "wandb_tags": ["a", "b"]}
    (tmp_path / "recipe.yaml").write_text(dump_recipe(make_recipe(training={"logging": logging})))
    (tmp_path / "run").mkdir()
    own = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40, "WANDB_MODE": "online", "PYTHONPATH": str(PROJECT)}

    def session(*arguments: str) -> str:
        command = [sys.executable, "-c", SESSION, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    session("0", "1", "2", "3", "4", "5")
    assert [row["_step"] for row in server.history] == [1, 2, 3, 4, 5]
    cut_metrics(tmp_path / "run", 3)  # the run goes on from its checkpoint of step 3, and trains steps 4 and 5 again
    said = session("0.5", "4", "5", "6", "7")
    assert [(row["_step"], row["loss"]) for row in server.history] == [
        *((n, n) for n in range(1, 6)),
        (6, 6.5),
        (7, 7.5),
    ]
    assert "Tried to log" not in said
    first = [run for run in server.runs if run["groupName"]]
    assert [(run["groupName"], run["tags"], run["project"]) for run in first] == [("g", ["a", "b"], "inl")] * 2
    assert {run["name"] for run in server.runs} == {(tmp_path / "run" / "wandb-id").read_text().strip()}
