"""Pushing to the hub: the hub's real client against a server that speaks the hub's protocol."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from huggingface_hub import constants
from tiny import DEMO, llama
from transformers import AutoTokenizer
from typer.testing import CliRunner

import eckart
from eckart.checkpoint.push import check_push, push_folder
from eckart.cli.app import app
from eckart.errors import CheckpointError, UsageError
from eckart.storage.manifest import find_changes

NAME = "me/smol-70"


class Hub:
    """Repositories of the hub, and the requests that are refused."""

    def __init__(self):
        self.files = {}  # repository -> path -> bytes
        self.private = {}
        self.stored = {}  # of large files: SHA-256 -> bytes
        self.refused = {}  # beginning of "METHOD /path" -> (status, message)
        self.seen = []
        self.messages = []
        self.cards = []  # whose metadata were checked

    def answer(self, method, path, body):
        """(status, JSON) of a request."""
        self.seen.append(f"{method} {path}")
        for words, (status, message) in self.refused.items():
            if f"{method} {path}".startswith(words):
                return status, {"error": message}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "orgs": [], "type": "user"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.files:
                return 409, {"error": "You already created this model repo", "url": self.url(name)}
            self.files[name], self.private[name] = {}, asked.get("visibility") == "private"
            return 200, {"url": self.url(name)}
        if "/info/lfs/objects/batch" in path:
            objects = [
                {"oid": one["oid"], "size": one["size"],
                 "actions": {"upload": {"href": f"{constants.ENDPOINT}/store/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]  # fmt: skip
            return 200, {"transfer": "basic", "objects": objects}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/store/"):
            self.stored[path.rpartition("/")[2]] = body
            return 200, {}
        owner, repo, action, *_ = [*path.removeprefix("/api/models/").split("/"), "info"]
        name = f"{owner}/{repo}"
        if name not in self.files:
            return 404, {"error": "Repository not found"}
        if action == "preupload":
            large = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": large}
        if action == "commit":
            return self.commit(name, [json.loads(line) for line in body.splitlines()])
        if action == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                for path, data in self.files[name].items()
            ]
            return 200, listed
        return 200, {"id": name, "sha": "0" * 40, "private": self.private[name], "tags": []}

    def commit(self, name, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.stored[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.files[name][value["path"]] = content
            else:
                assert line["key"] == "deletedFile"
                del self.files[name][value["path"]]
        return 200, {"commitUrl": f"{self.url(name)}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}

    @staticmethod
    def url(name):
        return f"{constants.ENDPOINT}/{name}"


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, said = hub.answer(self.command, self.path.partition("?")[0], body)
            text = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status >= 400:
                self.send_header("X-Error-Message", said["error"])
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the protocol of git-lfs
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def result():
    return eckart.compress(llama(num_hidden_layers=1, vocab_size=512), method="svd", form="lowrank", keep=0.5)


@pytest.fixture(scope="module")
def folder(result, tmp_path_factory):
    return result.save_pretrained(tmp_path_factory.mktemp("push") / "local-name")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_is_pushed_and_the_card_names_the_repository(hub, folder):
    before = content(folder)
    assert push_folder(folder, NAME) == f"{constants.ENDPOINT}/{NAME}"
    there, card = hub.files[NAME], hub.files[NAME].pop("README.md").decode()
    same = {path for path in before if path not in ("README.md", "eckart/files.json")}
    assert {path: there[path] for path in same} == {path: before[path] for path in same}
    assert set(there) == {*same, "eckart/files.json"}
    assert f'from_pretrained("{NAME}")' in card
    assert '"local-name"' not in card
    assert hub.cards
    assert set(hub.cards) == {card}
    assert content(folder) == before
    assert hub.private[NAME] is False
    assert hub.messages == ["Upload a model compressed with eckart"]


def test_name_without_owner_is_the_users_own(hub, folder):
    push_folder(folder, "smol-70", message="first")
    assert f'"{NAME}"' in hub.files[NAME]["README.md"].decode()
    assert hub.messages == ["first"]


def test_old_weights_are_replaced_and_other_files_stay(hub, folder):
    """transformers would load an old model.safetensors before new shards, and the other way round."""
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "eckart/old.json")
    hub.private[NAME], hub.files[NAME] = False, dict.fromkeys((*stale, "notes.md", "onnx/model.onnx"), b"old")
    push_folder(folder, NAME)
    assert not set(stale) & set(hub.files[NAME])
    assert {"notes.md", "onnx/model.onnx", "model.safetensors", "eckart/report.json"} <= set(hub.files[NAME])


def test_private_repository(hub, folder):
    push_folder(folder, NAME, private=True)
    assert hub.private[NAME] is True
    push_folder(folder, NAME, private=True)  # there already, and private
    hub.private["me/public"], hub.files["me/public"] = False, {}
    with pytest.raises(UsageError, match=r"local-name is published.*me/public is there already and is public"):
        push_folder(folder, "me/public", private=True)
    assert hub.files["me/public"] == {}


def test_result_is_pushed_from_memory_or_from_its_folder(hub, result, folder):
    result.push_to_hub(NAME)
    card = hub.files[NAME]["README.md"].decode()
    assert f'from_pretrained("{NAME}")' in card
    assert set(hub.files[NAME]) == set(content(folder))
    assert result.folder is None
    result.folder = folder
    try:
        result.push_to_hub("me/again", private=True)
    finally:
        result.folder = None
    assert hub.files["me/again"]["eckart/report.json"] == (folder / "eckart/report.json").read_bytes()
    assert hub.private["me/again"] is True


REFUSALS = [
    ("GET /api/whoami-v2", 401, "Invalid user token", UsageError, "does not accept the token.*hf auth login"),
    ("POST /api/repos/create", 403, "No rights here", CheckpointError, "No rights here.*may write"),
    ("POST /api/models/me/smol-70/commit", 403, "read only", CheckpointError, "read only.*hf auth login"),
    ("PUT /store/", 400, "broken", CheckpointError, "me/smol-70"),
    ("POST /api/models/me/smol-70/commit", 400, "Too large", CheckpointError, "answered 400.*Too large"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "status", "said", "error", "match"), REFUSALS, ids=[f"{r[0]} {r[1]}" for r in REFUSALS]
)
def test_failure_says_what_is_wrong_and_that_the_folder_is_there(hub, folder, request_, status, said, error, match):
    before = content(folder)
    hub.refused[request_] = status, said
    with pytest.raises(error, match=rf"(?s)local-name is published, and was not pushed.*eckart push .*{match}"):
        push_folder(folder, NAME)
    assert content(folder) == before


def test_failure_from_memory_says_where_the_result_is(hub, result):
    hub.refused["POST /api/repos/create"] = 403, "No rights here"
    with pytest.raises(CheckpointError, match=r"is in memory: keep it with save_pretrained.*No rights here"):
        result.push_to_hub(NAME)


def test_what_can_be_known_is_refused_first(hub, folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"--push-to-hub a/b/c: not a name"):
        check_push("a/b/c")
    with pytest.raises(CheckpointError, match="holds no model"):
        push_folder(tmp_path, NAME)
    assert hub.seen == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        check_push(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"Nobody is logged in.*hf auth login"):
        check_push(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"client failed.*Check the connection"):
        check_push(NAME)


def test_commands_push_what_they_published(hub, tmp_path):
    llama(num_hidden_layers=1, vocab_size=512).to(torch.float32).save_pretrained(tmp_path / "llama")
    words = ["compress", str(tmp_path / "llama"), "--method", "svd", "--form", "lowrank", "--keep", "0.5"]
    run = CliRunner().invoke
    done = run(app, [*words, "--output-dir", str(tmp_path / "small"), "--push-to-hub", NAME, "--private"])
    assert done.exit_code == 0, done.output
    assert f"pushed to {constants.ENDPOINT}/{NAME}" in done.output.replace("\n", "")
    assert hub.private[NAME] is True
    assert hub.files[NAME]["config.json"] == (tmp_path / "small/config.json").read_bytes()
    words = ["export", str(tmp_path / "small"), "--output-dir", str(tmp_path / "dense"), "--push-to-hub", "me/dense"]
    assert run(app, words).exit_code == 0
    assert "quantization_config" not in json.loads(hub.files["me/dense"]["config.json"])
    assert run(app, ["push", str(tmp_path / "small"), "me/again"]).exit_code == 0
    assert "model.safetensors" in hub.files["me/again"]


def test_pushed_records_name_no_place_of_this_machine(hub, tmp_path):
    model, text, small = tmp_path / "a-llama", tmp_path / "texts.txt", tmp_path / "small"
    llama(num_hidden_layers=1, vocab_size=8192).save_pretrained(model)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(model)
    text.write_text("A short text. " * 200)
    eckart.compress(
        model, data=str(text), num_samples=2, max_seq_length=16, keep=0.5, form="lowrank", method="svd",
        output_dir=small,
    )  # fmt: skip
    push_folder(small, NAME)
    recipe, report = (hub.files[NAME][f"eckart/{name}"].decode() for name in ("recipe.yaml", "report.json"))
    assert str(tmp_path) in (small / "eckart/recipe.yaml").read_text()
    assert not any(str(tmp_path).encode() in data for data in hub.files[NAME].values())
    assert yaml.safe_load(recipe)["model"] == "a-llama"
    assert json.loads(report)["recipe"]["data"] == "texts.txt"
    for name, data in hub.files[NAME].items():  # as it comes back from the hub
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(data)
    assert find_changes(tmp_path / "back") == (len(hub.files[NAME]) - 1, [])


def test_command_refuses_before_it_works_and_keeps_what_it_made(hub, tmp_path):
    llama(num_hidden_layers=1, vocab_size=512).to(torch.float32).save_pretrained(tmp_path / "llama")
    words = ["compress", str(tmp_path / "llama"), "--method", "svd", "--form", "lowrank", "--keep", "0.5",
             "--output-dir", str(tmp_path / "small")]  # fmt: skip
    run = CliRunner().invoke
    hub.refused["GET /api/whoami-v2"] = 401, "Invalid"
    assert run(app, [*words, "--push-to-hub", NAME]).exit_code == 2
    assert run(app, [*words, "--private"]).exit_code == 2
    assert not (tmp_path / "small").exists()
    hub.refused = {"POST /api/repos/create": (403, "No rights here")}
    done = run(app, [*words, "--push-to-hub", NAME])
    assert done.exit_code == 1
    assert "small is published, and was not pushed" in " ".join(done.output.split())
    assert eckart.load(tmp_path / "small") is not None
