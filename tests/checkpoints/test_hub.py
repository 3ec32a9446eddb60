"""Models on the hub, against one of our own on the loopback: fetched once, cached, refusals explained."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor

import sfumato
from sfumato.checkpoints.hub import HubName, download, hub_name, needed
from sfumato.checkpoints.load import open_model
from sfumato.checkpoints.open import vocabulary_file
from sfumato.errors import CheckpointError, ResourceError

State = dict[str, Tensor]
Equal = Callable[[torch.nn.Module, State], bool]
COMMIT, OLD = "a" * 40, "b" * 40


class Hub(BaseHTTPRequestHandler):
    """The few endpoints that a download asks for; `cut` files break off in the middle."""

    repos: ClassVar[dict[str, Path]] = {}
    gated: ClassVar[set[str]] = set()
    cut: ClassVar[set[str]] = set()
    asked: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if body:
            self.asked.append(path)
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        repo = "/".join(words[2:4] if api else words[:2])
        if repo in self.gated:
            return self.refuse(403, "GatedRepo", body)
        if repo not in self.repos:
            return self.refuse(401, "RepoNotFound", body)
        folder = self.repos[repo]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        revision = words[5] if len(words) > 5 and api else "main" if api else words[3]
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound", body)
        if api and "tree" in words:
            rows = [
                {
                    "type": "file",
                    "path": str(f.relative_to(folder)),
                    "size": f.stat().st_size,
                    "oid": digest(f),
                }
                for f in files
            ]
            return self.send(json.dumps(rows).encode(), body)
        if api:
            names = [{"rfilename": str(file.relative_to(folder))} for file in files]
            return self.send(json.dumps({"id": repo, "sha": COMMIT, "siblings": names}).encode(), body)
        file = folder / "/".join(words[4:])
        if not file.is_file():
            return self.refuse(404, "EntryNotFound", body)
        headers = {"ETag": f'"{digest(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self.send(file.read_bytes(), body, headers, cut="/".join(words[4:]) in self.cut)

    def send(
        self, content: bytes, body: bool, headers: dict[str, str] | None = None, *, cut: bool = False
    ) -> None:
        start = 0
        if (span := self.headers.get("Range")) is not None and body:
            start = int(span.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for key, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body and cut:
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(content[start:])

    def refuse(self, status: int, code: str, body: bool) -> None:
        content = json.dumps({"error": code}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on the loopback, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    before = constants.ENDPOINT
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(before, constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    impatient = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", impatient)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    Hub.repos, Hub.gated, Hub.cut, Hub.asked = {}, set(), set(), []
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def repository(tmp_path: Path, sd_folder: Path, hub: type[Hub]) -> Path:
    """The folder that "org/sd" is, with what a model does not need beside it."""
    path = Path(shutil.copytree(sd_folder, tmp_path / "repository"))
    (path / "safety_checker").mkdir()
    (path / "safety_checker" / "model.safetensors").write_bytes(b"never asked for")
    (path / "README.md").write_text("# A model")
    (path / "sd-v1.ckpt").write_bytes(b"the same in one file")
    (path / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    hub.repos["org/sd"] = path
    return path


def test_a_repository_is_fetched_once(
    hub: type[Hub], repository: Path, sd_states: dict[str, State], equal: Equal
) -> None:
    file = open_model("org/sd")
    assert all(equal(file.modules[part], state) for part, state in sd_states.items())
    assert file.config.name == "org/sd"
    fetched = {path.split(f"/{COMMIT}/")[1] for path in hub.asked if "/resolve/" in path}
    assert "unet/diffusion_pytorch_model.safetensors" in fetched and "tokenizer/vocab.json" in fetched
    unwanted = ("safety_checker", "README", "sd-v1.ckpt", "fp16")
    assert not [name for name in fetched if any(word in name for word in unwanted)]
    hub.asked.clear()
    assert sfumato.load("org/sd", device="cpu", revision="main").name == "org/sd"
    assert not [path for path in hub.asked if "/resolve/" in path]


def test_the_cache_alone(hub: type[Hub], repository: Path, sd_states: dict[str, State], equal: Equal) -> None:
    with pytest.raises(ResourceError, match="org/sd is neither a path here nor in the hub's cache"):
        open_model("org/sd", offline=True)
    assert hub.asked == []
    open_model("org/sd")
    hub.asked.clear()
    file = open_model("org/sd", offline=True)
    assert equal(file.modules["unet"], sd_states["unet"]) and hub.asked == []
    with pytest.raises(ResourceError, match="revision 'v2' of org/sd is neither"):
        open_model("org/sd", offline=True, revision="v2")


def test_the_environments_offline_switch(
    hub: type[Hub], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_model("org/sd")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_model("org/sd").config.name == "org/sd" and hub.asked == []


def test_a_hub_that_is_not_there(hub: type[Hub], repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_model("org/sd")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert open_model("org/sd").config.name == "org/sd"
    with pytest.raises(ResourceError, match=r"org/other is neither .*, and the hub cannot be reached"):
        open_model("org/other")


def test_files_and_folders_of_a_repository(
    hub: type[Hub], repository: Path, sd_file: Path, sd_states: dict[str, State], equal: Equal
) -> None:
    shutil.copy(sd_file, repository / "one.safetensors")
    file = open_model("org/sd/one.safetensors")
    assert equal(file.modules["text"], sd_states["text"]) and file.config.name == "org/sd/one.safetensors"
    assert list(open_model("org/sd/vae").modules) == ["autoencoder"]
    other = open_model("org/sd/one.safetensors", vae="org/sd/vae", offline=True)
    assert equal(other.modules["autoencoder"], sd_states["autoencoder"])
    with pytest.raises(CheckpointError, match=r"org/sd/two\.safetensors holds no model file on the hub"):
        open_model("org/sd/two.safetensors")


def test_a_repository_of_single_files(hub: type[Hub], tmp_path: Path, sd_file: Path) -> None:
    (tmp_path / "files").mkdir()
    hub.repos["org/files"] = tmp_path / "files"
    with pytest.raises(CheckpointError, match="holds no model file on the hub"):
        open_model("org/files")
    shutil.copy(sd_file, tmp_path / "files" / "a.safetensors")
    assert open_model("org/files").opened.layout == "ldm"
    (tmp_path / "files" / "b.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"2 models on the hub: a\.safetensors, b\.safetensors"
    ) as caught:
        download(HubName("org/files"), revision="main")
    assert "org/files/FILE" in caught.value.hint


def test_refusals_are_explained(hub: type[Hub], repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no file or folder org/nothing here, and no repository"):
        open_model("org/nothing")
    with pytest.raises(CheckpointError, match="org/sd has no revision 'v9'"):
        open_model("org/sd", revision="v9")
    hub.gated.add("org/sd")
    with pytest.raises(CheckpointError, match="org/sd is gated") as caught:
        open_model("org/sd")
    assert "https://huggingface.co/org/sd" in caught.value.hint


def test_an_interrupted_download_leaves_no_model(
    hub: type[Hub], repository: Path, tmp_path: Path, sd_states: dict[str, State], equal: Equal
) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    hub.cut.add(name)
    with pytest.raises(ResourceError, match="org/sd"):
        open_model("org/sd")
    assert not list((tmp_path / "cache").rglob(f"snapshots/*/{name}"))
    with pytest.raises((CheckpointError, ResourceError)):
        open_model("org/sd", offline=True)
    hub.cut.clear()
    assert equal(open_model("org/sd").modules["unet"], sd_states["unet"])


def test_the_variant_that_is_asked_for(hub: type[Hub], repository: Path) -> None:
    weights = repository / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(weights).items()}
    from safetensors.torch import save_file

    save_file(half, repository / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    file = open_model("org/sd", variant="fp16")
    assert file.modules["unet"].get_parameter("out.2.bias").dtype == torch.float16
    assert not [path for path in hub.asked if path.endswith("unet/diffusion_pytorch_model.safetensors")]


def test_a_vocabulary_on_the_hub(hub: type[Hub], tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    for name in ("vocab.txt", "other.txt", "model.safetensors"):
        (tmp_path / "bert" / name).write_text(name)
    hub.repos["org/bert"] = tmp_path / "bert"
    assert vocabulary_file("org/bert").read_text() == "vocab.txt"
    assert vocabulary_file("org/bert/other.txt").read_text() == "other.txt"
    assert vocabulary_file("org/bert", offline=True).read_text() == "vocab.txt"
    assert not [path for path in hub.asked if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/name", HubName("org/name")),
        (
            "stabilityai/sd-vae-ft-mse",
            HubName("stabilityai/sd-vae-ft-mse"),
        ),
        ("org/na.me/unet", HubName("org/na.me", "unet")),
        ("org/name/a/b.ckpt", HubName("org/name", "a/b.ckpt")),
        ("models/file.safetensors", None),
        ("/org/name", None),
        ("./org/name", None),
        ("../name", None),
        ("org/name/../../x", None),
        ("name", None),
        ("a b/c", None),
        ("https://huggingface.co/org/name", None),
    ],
)
def test_what_is_a_name_on_the_hub(text: str, found: HubName | None) -> None:
    assert hub_name(text) == found


def test_a_path_with_a_slip_in_it_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="cannot open runs/model"):
        open_model("runs/model")


NAMES = [
    "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.bin", "unet/deep/x.json", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors.index.json",
    "vae/diffusion_pytorch_model-00001-of-00001.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt",
    "image_encoder/model.safetensors", "v1.ckpt",
]  # fmt: skip


def test_what_is_needed_of_a_repository() -> None:
    assert needed(NAMES, HubName("org/a"), None) == [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model-00001-of-00001.safetensors", "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    ]  # fmt: skip
    assert needed(NAMES, HubName("org/a", "v1.ckpt"), None) == ["v1.ckpt"]
    assert needed(NAMES, HubName("org/a", "unet"), None) == [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
