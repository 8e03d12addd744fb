"""Hubs that are silent, slow, broken, or something else: one line a case.

Each ends in one line that says the status or what was found, or in the right files;
no case waits longer than a fraction of a second.
"""

import gzip
import json
import time
from collections.abc import Callable, Iterator
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import short
from huggingface_hub import constants
from safetensors.torch import save

from minidiff.files import hub
from minidiff.files.layout import PUBLISHED

MEDIUM = PUBLISHED["sd3.5-medium"]
PATIENCE = 0.3  # seconds
INDEX, CONFIG = "model_index.json", "transformer/config.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FILES = {
    INDEX: b"{}",
    CONFIG: b'{"a": 1}',
    WEIGHTS: save({"a": torch.ones(3)}),
    "text_encoder/model.safetensors": save({"b": torch.ones(3)}),
    "text_encoder/model.fp16.safetensors": save({"b": torch.ones(3).half()}),
}


class Answer(BaseHTTPRequestHandler):
    """Answers as the hub does, unless the server's ``act`` does otherwise."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if not self.server.act(self):
            self.answer()

    do_HEAD = do_GET

    @property
    def listing(self) -> bool:
        return self.path.startswith("/api/")

    def answer(self) -> None:
        if self.listing:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in self.server.files.items()
            ]
            names = [{"rfilename": file["path"]} for file in tree]
            known = {"id": MEDIUM.repository, "sha": MEDIUM.revision, "siblings": names}
            return self.send(json.dumps(tree if "/tree/" in self.path else known))
        name = self.path.split(f"/{MEDIUM.revision}/")[-1]
        content = self.server.files[name]
        self.send(self.server.sent.get(name, content), headers(content))

    def send(self, content: Any, head: Any = (), status: int = 200) -> bool:
        data = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        found = {"Content-Length": len(data), "Content-Type": "text/plain"} | dict(head)
        for key, value in found.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return True


def headers(content: bytes) -> dict[str, str]:
    """Weights go by their SHA-256, what is smaller by git's hash."""
    small = content.startswith(b"{")
    tag = (sha1(b"blob %d\0" % len(content)) if small else sha256()).copy()
    tag.update(content)
    return {
        "ETag": f'"{tag.hexdigest()}"',
        "X-Linked-Size": str(len(content)),
        "X-Repo-Commit": MEDIUM.revision,
    }


@pytest.fixture
def server() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.files, server.sent, server.asked = dict(FILES), {}, []
    server.act, server.over = lambda _: False, Event()
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()


@pytest.fixture
def fetch(server: Any, monkeypatch: Any, tmp_path: Path) -> Callable[..., Path]:
    """``hub.download`` from the server into an empty cache, without waits."""
    url = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    settings = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    settings |= {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_DISABLE_XET": True}
    for name, value in (settings | {"HF_HUB_OFFLINE": False}).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for module in ("utils._http", "file_download"):
        clock = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
        monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)

    def call(model: str = "sd3.5-medium", **how: Any) -> Path:
        return hub.download_model(model, **how)

    return call


# What a hub may do instead of answering


def always(content: Any, status: int = 200, **head: Any) -> Callable:
    names = {name.replace("_", "-"): value for name, value in head.items()}
    return lambda asked: asked.send(content, names, status)


def lists(content: Any, status: int = 200, **head: Any) -> Callable:
    """To a question for names this, else what a hub hub."""
    text = content if isinstance(content, str) else json.dumps(content)
    instead = always(text, status, **head)
    return lambda asked: asked.listing and instead(asked)


def heads(name: str, **head: Any) -> Callable:
    """For the file ``name`` other headers."""
    names = {key.replace("_", "-"): value for key, value in head.items()}

    def act(asked: Any) -> bool:
        if not asked.path.endswith(name):
            return False
        return asked.send(FILES[name], headers(FILES[name]) | names)

    return act


def silent(asked: Any) -> bool:
    return asked.server.over.wait()


def silent_later(asked: Any) -> bool:
    return asked.path.endswith(WEIGHTS) and silent(asked)


def drip(asked: Any) -> bool:
    """The weights, a byte at a time; each comes before a connection is given up."""
    if not asked.path.endswith(WEIGHTS) or asked.command == "HEAD":
        return False
    asked.send_response(200)
    asked.send_header("Content-Length", str(len(FILES[WEIGHTS])))
    asked.end_headers()
    for byte in FILES[WEIGHTS]:
        asked.wfile.write(bytes([byte]))
        asked.wfile.flush()
        if asked.server.over.wait(0.02):
            break
    return True


def endless(asked: Any) -> bool:
    """An answer without a length, and without an end."""
    asked.send_response(200)
    asked.end_headers()
    while not asked.server.over.is_set():
        asked.wfile.write(b" " * 100_000)
    return True


def packed(asked: Any) -> bool:
    """A list of names that is small on its way."""
    assert asked.headers["Accept-Encoding"] == "identity"
    return asked.send(gzip.compress(b" " * 10**6), {"Content-Encoding": "gzip"})


def leads_away(asked: Any) -> bool:
    if "login" in asked.path:
        return asked.send("<html>", {"Content-Type": "text/html"})
    return asked.send("", {"Location": "/login"}, 302)


GATE = {"X_Error_Code": "GatedRepo"}
ABSENT, NO_REVISION = {"X_Error_Code": "RepoNotFound"}, "RevisionNotFound"
NEEDS = "it needs a network, the licence accepted at https://hugg.*HF_TOKEN"
BROKEN = [
    (always("", 401, **GATE), f"is gated .the hub answers 401.: {NEEDS}"),
    (always("", 403, **GATE), f"is gated .the hub answers 403.: {NEEDS}"),
    (always("", 401, **ABSENT), f"not on the hub, or not for you .*401.: {NEEDS}"),
    (always("", 403), f"is not on the hub, or not for you .*403.: {NEEDS}"),
    (always("", 404, **ABSENT), "sd3.5-medium is not on the hub: the hub answers 404"),
    (always("", 404), "sd3.5-medium is not on the hub: the hub answers 404"),
    (always("", 404, X_Error_Code=NO_REVISION), "no revision 'b940.*': .*answers 404"),
    (always("", 418), "cannot be fetched: the hub answers 418; try again later"),
    (always("", 429), "cannot be fetched: the hub answers 429; try again later"),
    (always("", 429, Retry_After=100_000), "answers 429 and asks to wait 100000 s"),
    (always("", 503, Retry_After=9**99), "answers 503 and asks to wait 295126654 s"),
    (always("", 429, ratelimit='"api";r=0;t=9000'), "asks to wait 9000 s; try again"),
    (always("", 500), "cannot be fetched: the hub answers 500; try again later"),
    (always("", 502), "cannot be fetched: the hub answers 502; try again later"),
    (always("<html>", 503), "cannot be fetched: the hub answers 503; try again later"),
    (
        always("<html>", Content_Type="text/html"),
        "answers 200 with text/html, which",
    ),
    (leads_away, "127.0.0.1 leads to /login, which no hub does; a login page of the"),
    (lists("{}"), "answers {}, which no hub does"),
    (lists("null"), "answers None, which no hub does"),
    (lists("[]"), r"answers \[\], which no hub does"),
    (lists("5"), "answers 5, which no hub does"),
    (lists("[1]"), r"answers \[1\], which no hub does"),
    (lists([{"path": 5}]), "answers .*, which no hub does"),
    (lists([{"type": "file"}]), "answers .*, which no hub does"),
    (lists("x" * 400_000), "answers 200 with text/plain, which no hub does"),
    (lists(json.dumps(["x" * 400_000])), "answers .*xxx…, which no hub does"),
    (lists("[" * 100_000), "answers 200 with text/plain, which no hub does"),
    (lists([{"path": "../x"}]), "lists '../x'; expected a file inside its folder"),
    (
        lists([{"path": "vae/../../x.json"}]),
        "lists 'vae/../../x.json'; expected a",
    ),
    (lists([{"path": "/etc/x"}]), "lists '/etc/x'; expected a file inside"),
    (lists([{"path": "a\\..\\x"}]), "lists .*; expected a file inside its folder"),
    (lists([{"path": ""}]), "lists ''; expected a file inside its folder"),
    (silent, "cannot be fetched: 127.0.0.1 has been silent for .* s"),
    (silent_later, "cannot be fetched: 127.0.0.1 has been silent for .* s"),
    (drip, "cannot be fetched: 127.0.0.1 (is too slow|has been silent)"),
    (endless, "answers more than 500,000 bytes; no end seen"),
    (lists(" " * 600_000), "answers more than 500,000 bytes; no end seen"),
    (always("x" * 600_000, 500), "answers more than 500,000 bytes; no end seen"),
    (packed, "127.0.0.1 answers in gzip; expected plain bytes"),
    (heads(CONFIG, ETag='"../../x"'), "names a file '\"../../x\"'; expected its hash"),
    (heads(WEIGHTS, X_Linked_ETag="../x"), "names a file '../x'; expected its hash"),
    (heads(WEIGHTS, X_Repo_Commit="../x"), "names a file '../x'; expected its hash"),
    (heads(WEIGHTS, X_Repo_Commit=""), "names a file ''; expected its hash"),
    (heads(WEIGHTS, ETag=""), "names a file ''; expected its hash"),
    (heads(WEIGHTS, ETag="."), "names a file '.'; expected its hash"),
    (heads(WEIGHTS, X_Linked_Size=9), "interrupted .*should be of size 9"),
]


@pytest.mark.parametrize(("act", "message"), BROKEN, ids=short)
def test_broken_hubs(server, fetch, monkeypatch, act, message):
    monkeypatch.setattr(hub, "LONGEST", 500_000)
    monkeypatch.setattr(hub, "SLOWEST", 10_000)
    server.act = act
    short = PATIENCE if act in (silent, silent_later, drip) else None
    refused(message, lambda: fetch(patience=short))


def refused(message: str, call: Callable[[], Any]) -> None:
    """``call`` raises one short line that ``message`` is found in."""
    with pytest.raises((ValueError, OSError), match=message) as failed:
        call()
    told = str(failed.value)
    assert "\n" not in told and len(told) < 600, told[:1000]


def test_files_are_longer_than_what_is_read_whole(server, fetch, monkeypatch):
    monkeypatch.setattr(hub, "LONGEST", 1_000)
    server.files = {INDEX: b"{}", WEIGHTS: save({"a": torch.ones(1_000)})}
    assert (fetch() / WEIGHTS).read_bytes() == server.files[WEIGHTS]


def test_a_closed_port_is_told(server, fetch):
    server.shutdown()
    server.server_close()
    refused(r"cannot be fetched \(Conn.*refused\): it needs a network", fetch)


CALLS = [
    ({"revision": "../../x"}, "revision is '../../x'; expected a name"),
    ({"revision": ""}, "revision is ''; expected a name"),
    ({"revision": "a b"}, "revision is 'a b'; expected a name"),
    ({"revision": "x" * 10_000 + "?"}, "revision is 'xxx.*…; expected a name"),
    ({"variant": "../x"}, "variant is '../x'; expected a name"),
    ({"variant": "fp8"}, "variant is 'fp8'; the repository has no such weights"),
]


@pytest.mark.parametrize(("how", "message"), CALLS, ids=short)
def test_bad_calls(fetch, how, message):
    refused(message, lambda: fetch(**how))


CHANGED = [
    (CONFIG, b'{"a": 2}', "config.json is damaged: its SHA-1 begins with .* deleted"),
    (INDEX, b"[]", "model_index.json is damaged: its SHA-1 begins"),
    (WEIGHTS, FILES[WEIGHTS][:-1] + b"x", "safetensors is damaged: its SHA-256 begins"),
]


@pytest.mark.parametrize(("name", "sent", "message"), CHANGED, ids=short)
def test_damaged_files_are_named_and_come_again(server, fetch, name, sent, message):
    server.sent[name] = sent
    refused(message, fetch)
    server.sent.clear()
    assert (fetch() / name).read_bytes() == FILES[name]


def test_a_repository_without_a_pipeline_is_told(server, fetch):
    del server.files[INDEX]
    refused("has no model_index.json: no pipeline", fetch)


# What is fetched


BIG, HALF = "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors"
RIGHT = [
    ({}, {INDEX, CONFIG, WEIGHTS, BIG}),
    ({"variant": "fp16"}, {INDEX, CONFIG, WEIGHTS, HALF}),
    ({"weights": False}, {INDEX, CONFIG}),
    ({"weights": False, "variant": "fp16"}, {INDEX, CONFIG}),
    ({"revision": "main"}, {INDEX, CONFIG, WEIGHTS, BIG}),
]


@pytest.mark.parametrize(("how", "names"), RIGHT, ids=short)
def test_what_is_fetched(server, fetch, how, names):
    folder = fetch(**how)
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == names
    assert any("/main" in path for path in server.asked) == ("revision" in how)


@pytest.mark.parametrize("act", [silent, always("", 500), always("", 403)])
def test_what_is_here_is_used_when_the_hub_is_not(server, fetch, tmp_path, act):
    folder = fetch()
    server.act = act
    short = {"patience": PATIENCE} if act is silent else {}
    assert fetch(**short) == folder
    for tree in tmp_path.rglob("trees"):
        for file in tree.iterdir():
            file.unlink()
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError):
        fetch(**short)


def test_the_clients_of_others_are_left_as_they_were(fetch):
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY
    fetch()
    assert _http._GLOBAL_CLIENT_FACTORY is before
