"""Pushing an export to a stand-in for the hub: the library's own requests, answered on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from ecar_dist.cli import main
from tests.sample.made_models import make_model_run

NAME = "somebody/flags-and-faces"


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: weights by the protocol for large files, everything else within the commit."""

    def reply(self, tree, status=200):
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        self.server.seen.append(self.path)
        self.reply({"error": "there is nothing"}, 404)

    def do_PUT(self):
        self.server.large[self.path.rpartition("/")[2]] = self.body()
        self.reply({})

    def do_POST(self):
        self.server.seen.append(self.path)
        url = f"http://127.0.0.1:{self.server.server_port}"
        body = self.body()
        if self.server.refuses or self.headers["Authorization"] != "Bearer hf_secret":
            return self.reply({"error": "you may not write here"}, 403)
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.reply({"url": f"{url}/{NAME}", "name": NAME, "id": NAME})
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if self.path == f"/api/models/{NAME}/preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {file: "lfs" if file.endswith(".safetensors") else "regular" for file in files}
            listed = [{"path": file, "uploadMode": mode, "shouldIgnore": False} for file, mode in modes.items()]
            return self.reply({"files": listed})
        if self.path == f"/{NAME}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            actions = [{**one, "actions": {"upload": {"href": f"{url}/large/{one['oid']}"}}} for one in objects]
            return self.reply({"transfer": "basic", "objects": actions})
        if self.path == f"/api/models/{NAME}/commit/main":
            self.server.commit += [json.loads(line) for line in body.splitlines()]
            return self.reply({"commitUrl": f"{url}/{NAME}/commit/1", "commitOid": "1" * 40, "success": True})
        return self.reply({"error": "unknown"}, 404)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.large, server.commit, server.created, server.refuses = [], {}, [], None, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The library reads the variables HF_ENDPOINT and HF_TOKEN when it is imported, which other tests have done.
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a separate protocol for large files
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_model_run(tmp_path_factory.mktemp("pushed"))
    (run / "scores.json").write_text(json.dumps({"FD-flags": 12.5, "samples_seen": 192, "weights": "ema"}))
    return run


def test_an_export_is_pushed_with_its_scores(hub, run, tmp_path, capsys):
    out = tmp_path / "export"
    assert main(["checkpoint", "export", str(run), "--out", str(out), "--push-to-hub", NAME]) == 0
    assert hub.created["visibility"] == "private"
    assert capsys.readouterr().out.splitlines()[-1].endswith(NAME)

    # Small files are in the commit, large ones are uploaded separately.
    files = {line["value"]["path"]: line["value"] for line in hub.commit if line["key"] != "header"}
    assert files.keys() == {path.name for path in out.iterdir()}
    card = base64.b64decode(files["README.md"]["content"]).decode()
    assert card == (out / "README.md").read_text()
    assert "| FD-flags | 12.5 |" in card
    assert list(hub.large.values()) == [(out / "model.safetensors").read_bytes()]

    # An existing export is pushed unchanged.
    hub.commit.clear()
    assert main(["checkpoint", "export", str(out), "--push-to-hub", NAME]) == 0
    assert len(hub.commit) > 5


def test_a_refused_push_says_that_the_export_is_there(hub, run, tmp_path, capsys):
    hub.refuses = True
    out = tmp_path / "export"
    assert main(["checkpoint", "export", str(run), "--out", str(out), "--push-to-hub", NAME]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"checkpoint export {out} --push-to-hub {NAME}" in said
    assert "hf_secret" not in said
    assert (out / "config.json").exists()


@pytest.mark.parametrize("name", ["a b", "a/b/c", "", "-x", "../x"])
def test_names_that_no_repository_can_have(hub, run, tmp_path, capsys, name):
    assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / "e"), f"--push-to-hub={name}"]) == 1
    assert "OWNER/NAME" in capsys.readouterr().err
    assert not hub.seen
    assert not (tmp_path / "e").exists()


def test_a_push_without_a_token(hub, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / "e"), "--push-to-hub", NAME]) == 1
    assert "HF_TOKEN" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
