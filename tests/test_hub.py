"""The download against a small hub of our own: what is fetched, resumed and refused."""

import hashlib
import json
import logging
import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from minidiff.dit import MMDiTConfig
from minidiff.files import hub
from minidiff.files.layout import PUBLISHED, recognize

REPOSITORY = PUBLISHED["sd3.5-medium"].repository
COMMIT = PUBLISHED["sd3.5-medium"].revision
WEIGHTS = save({"weight": torch.arange(6_000_000.0)})  # more than one chunk of 10 MB
FILES = {
    "model_index.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": WEIGHTS,
    "text_encoder/model.safetensors": save({"a": torch.ones(3)}),
    "text_encoder_3/model.safetensors": save({"b": torch.ones(3)}),
    "text_encoder/model.fp16.safetensors": b"left out",
    "text_encoders/clip_l.safetensors": b"left out",
    "sd3.5_medium.safetensors": b"left out",
    "README.md": b"left out",
}
WANTED = [name for name, content in FILES.items() if content != b"left out"]


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does; its server counts, cuts off and refuses."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body):
        state = self.server
        state.requests.append((self.command, self.path, self.headers.get("Range")))
        if state.refuse:
            return self.refuse(*state.refuse)
        if self.path.startswith("/api/models/"):
            names = [{"rfilename": name} for name in FILES]
            info = {"id": REPOSITORY, "sha": COMMIT, "siblings": names, "tags": []}
            if "/tree/" in self.path:
                info = [
                    {"type": "file", "path": n, "size": len(c), "oid": "0" * 40}
                    for n, c in FILES.items()
                ]
            return self.send(200, json.dumps(info).encode(), {}, body)
        if "/resolve/" not in self.path:
            return self.send(404, b"", {}, body)
        name = self.path.split(f"/resolve/{COMMIT}/")[1]
        content = state.changed.get(name, FILES[name])
        digest = hashlib.sha256(FILES[name]).hexdigest()
        headers = {
            "ETag": f'"{digest}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(FILES[name])),
            "Accept-Ranges": "bytes",
        }
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if start:
            end = len(content) - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.send(206 if start else 200, content[start:], headers, body, name)

    def send(self, status, content, headers, body, name=""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        if self.server.cut.get(name, 0) > 0:
            self.server.cut[name] -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def refuse(self, status, code):
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, True)


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.refuse, server.cut, server.changed = [], None, {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def download(server, tmp_path, monkeypatch, run):
    """``minidiff download sd3.5-medium`` with this hub and an empty cache."""
    endpoint, default = f"http://127.0.0.1:{server.server_port}", constants.ENDPOINT
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(default, endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    settings = {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    settings |= {"HF_HUB_CACHE": str(tmp_path / "cache" / "hub")}
    settings |= {"HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [])

    def call(*options, words=("download", "sd3.5-medium"), **changed):
        for name, value in (settings | changed).items():
            monkeypatch.setattr(constants, name, value)
        code, out, err = run(*words, *options)
        assert "hf_secret" not in out + err and "Traceback" not in err
        lines = [line for line in err.splitlines() if line.startswith("minidiff: ")]
        return code, out.strip(), "\n".join(lines)

    return call


@pytest.mark.slow
def test_only_what_is_needed_at_the_pinned_revision(server, download):
    code, folder, message = download()
    assert (code, message) == (0, "")
    assert folder.endswith(f"snapshots/{COMMIT}")
    paths = [os.path.relpath(os.path.join(d, f), folder) for d, _, fs in
             os.walk(folder) for f in fs]  # fmt: skip
    assert sorted(paths) == sorted(WANTED)
    assert all("main" not in path for _, path, _ in server.requests)
    server.requests.clear()
    assert download()[0] == 0  # the second time nothing is fetched
    fetched = [p for m, p, _ in server.requests if m == "GET" and "/resolve/" in p]
    assert not fetched


def test_access_is_told_in_a_line(server, download, monkeypatch):
    """Without a token in it; ``download`` sets the hub."""
    download(words=("info", "tiny"))
    for refuse, told in [
        (None, f"{REPOSITORY}: its files can be fetched with this token"),
        ((401, "GatedRepo"), f"{REPOSITORY} is gated (the hub answers 401): it needs"),
        ((403, "GatedRepo"), f"{REPOSITORY} is gated (the hub answers 403): it needs"),
        ((404, "RepoNotFound"), "sd3.5-medium is not on the hub: the hub answers 404"),
    ]:
        server.refuse = refuse
        line = hub.access("sd3.5-medium")
        assert line.startswith(told) and "\n" not in line and "hf_secret" not in line
    monkeypatch.delenv("HF_TOKEN")
    server.refuse = None
    assert hub.access(REPOSITORY).endswith("its files can be fetched")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = "no answer (OfflineModeIsEnabled): offline, or not reachable"
    assert hub.access("sd3.5-medium") == told


@pytest.mark.slow
def test_what_the_cache_has(download):
    download(words=("info", "tiny"))
    assert hub.find_cached("sd3.5-medium") is None
    code, folder, _ = download()
    assert code == 0 and hub.find_cached("sd3.5-medium") == Path(folder)
    assert (
        hub.find_cached(REPOSITORY) == Path(folder)
        and hub.find_cached("some/one") is None
    )


@pytest.mark.slow
def test_the_full_name_stands_for_the_same_revision(server, download):
    code, folder, _ = download(words=("download", REPOSITORY))
    assert code == 0 and folder.endswith(f"snapshots/{COMMIT}")
    assert all("main" not in path for _, path, _ in server.requests)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "message"),
    [(REPOSITORY, "height is 1000; expected"), ("some/one", "is a None; expected a")],
)
def test_a_call_is_checked_before_weights_come(server, download, model, message):
    words = "sample", "a bag", "--model", model, "--height", "1000"
    code, _, told = download(words=words)
    assert code == 2 and message in told
    assert not gets(server, "safetensors")


@pytest.mark.slow
def test_t5_can_be_left_out(server, download):
    code, folder, _ = download("--without-t5")
    assert code == 0 and not gets(server, "text_encoder_3/model.safetensors")
    assert not (Path(folder) / "text_encoder_3").exists()
    assert (Path(folder) / "text_encoder").is_dir()


def gets(server, name):
    """The Range of every request for the file's content."""
    return [r for m, p, r in server.requests if m == "GET" and p.endswith(name)]


@pytest.mark.slow
def test_a_broken_connection_is_taken_up_where_it_broke(server, download):
    name = "transformer/diffusion_pytorch_model.safetensors"
    server.cut[name] = 1
    code, folder, _ = download()
    half = len(WEIGHTS) // 2  # what came, in whole chunks
    again = f"bytes={half - half % constants.DOWNLOAD_CHUNK_SIZE}-"
    assert code == 0 and gets(server, name) == [None, again]
    assert (Path(folder) / name).read_bytes() == WEIGHTS


def test_an_error_of_the_transport_is_told_in_one_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Data processing error: CAS service\n more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    told = r"interrupted \(RuntimeError: Data processing error: CAS service\); asked"
    with pytest.raises(ConnectionError, match=told):
        hub.download_model("sd3.5-medium")


@pytest.mark.slow
def test_after_an_interruption_only_missing_files_are_fetched(server, download):
    name = "text_encoder/model.safetensors"
    server.cut[name] = 100
    code, out, message = download()
    assert code == 2 and not out and "was interrupted" in message
    server.cut.clear()
    server.requests.clear()
    assert download()[0] == 0
    assert len(gets(server, name)) == 1
    assert not gets(server, "diffusion_pytorch_model.safetensors")


def test_a_corrupted_file_is_named(server, download):
    name = "transformer/diffusion_pytorch_model.safetensors"
    server.changed[name] = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
    code, _, message = download()
    assert code == 2 and name in message and "SHA-256" in message
    server.changed.clear()
    code, folder, _ = download()
    assert code == 0 and Path(folder, name).read_bytes() == WEIGHTS


@pytest.mark.slow
def test_sample_too_checks_what_it_fetches(server, download, tmp_path):
    name = "text_encoder/model.safetensors"
    server.changed[name] = FILES[name][:-1] + bytes([FILES[name][-1] ^ 1])
    words = "sample", "a bag", "--model", "sd3.5-medium"
    code, _, message = download(words=words)
    assert code == 2 and name in message and "SHA-256" in message
    code, _, message = download(words=words)  # it was deleted, and comes again
    assert code == 2 and name in message and "SHA-256" in message
    server.changed.clear()
    code, _, message = download(words=words)  # whole, but of no model
    assert code == 2 and "SHA-256" not in message
    digest = hashlib.sha256(FILES[name]).hexdigest()
    (blob,) = tmp_path.glob(f"cache/**/blobs/{digest}")
    blob.write_bytes(FILES[name][:-1] + bytes([FILES[name][-1] ^ 1]))
    code, _, message = download(words=words)  # older than this command
    assert code == 2 and "SHA-256" not in message
    code, _, message = download()
    assert code == 2 and name in message and "SHA-256" in message


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (403, "GatedRepo"),
        (401, "GatedRepo"),
        (401, "RepoNotFound"),
        (401, "Invalid credentials in Authorization header"),
        (403, "Forbidden"),
    ],
)
def test_a_refusal_says_what_to_do(server, download, status, reason):
    server.refuse = status, reason
    code, out, message = download()
    assert code == 2 and not out and message.count("\n") == 0
    assert f"https://huggingface.co/{REPOSITORY}" in message and "licence" in message


def test_a_cache_that_cannot_be_written_is_named(download, tmp_path):
    (tmp_path / "file").write_text("no folder")
    code, out, message = download(HF_HUB_CACHE=str(tmp_path / "file"))
    assert code == 2 and not out and message.count("\n") == 0
    assert f"{REPOSITORY} cannot be kept: " in message
    assert "models--stabilityai" in message  # the rest of a long name may be cut


# The table of published models


MEDIUM, LARGE = MMDiTConfig.sd35_medium(), MMDiTConfig.sd35_large()
TURBO = "stabilityai/stable-diffusion-3.5-large-turbo"


@pytest.mark.parametrize(
    ("config", "origin", "expected"),
    [
        (MMDiTConfig.tiny(), "", "tiny"),
        (MEDIUM, "my-turbo-style", "sd3.5-medium"),
        (MEDIUM, "a/turbo", "sd3.5-medium"),
        (LARGE, "", "sd3.5-large"),
        (LARGE, "/turbo/large", "sd3.5-large"),
        (LARGE, "sd3.5-large-turbo", "sd3.5-large-turbo"),
        (LARGE, f"/folder/{TURBO}", "sd3.5-large-turbo"),
        (
            LARGE,
            f"/c/models--{TURBO.replace('/', '--')}/snapshots/1",
            "sd3.5-large-turbo",
        ),
        (LARGE, "sd3.5_large_turbo.safetensors", "sd3.5-large-turbo"),
        (LARGE, "sd3.5_large_turbo", "sd3.5-large-turbo"),
        (LARGE, "/sd3.5-large-turbo/mine", "sd3.5-large"),
        (replace(LARGE, qk_norm=None), "", None),  # like Stable Diffusion 3 Medium
        (MMDiTConfig(num_layers=2), "a/large-turbo", None),
    ],
)
def test_a_model_is_recognised_by_what_it_is(config, origin, expected):
    found = recognize(config, origin)
    assert (found and found.name) == expected
