"""Model folders from the hub, through huggingface_hub, which asks and retries.

What a hub answers is judged before it is used: it comes in time, is of its kind, and
has safe names. Imported only when needed.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from minidiff.files.disk import excerpt
from minidiff.files.layout import INDEX, named
from minidiff.files.weights import of_variant, open_tensors

PATIENCE = 30.0  # seconds without an answer
SLOWEST = 1_000  # bytes a second
LONGEST = 20_000_000  # bytes that are read whole, or of which no number is said

COMPONENTS = ("scheduler", "text_encoder*", "tokenizer*", "transformer", "vae")
KINDS = ("*.json", "*.txt", "*.model", "*.safetensors")
HASH = "[0-9a-f]{40}|[0-9a-f]{64}"  # names of files in the hub's cache
# fp16 copies of the text encoders, and the single files' folder of them
LEFT_OUT = ("*.fp16*", "text_encoders/*")


class NoAnswer(ConnectionError):
    """A hub that is silent, too slow or asks to wait, or something that is no hub.

    ``listing``: the question was which files there are; none has been asked for.
    """

    listing = False


@contextmanager
def judged(patience: float | None = None) -> Iterator[None]:
    """Within, huggingface_hub's requests have deadlines and its answers are judged."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    usual = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
    watch = Watch(PATIENCE if patience is None else patience)

    def make() -> Any:
        client = usual()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], partial(noting, watch.before)],
            "response": [*hooks["response"], partial(noting, watch.after)],
        }
        return client

    set_client_factory(make)
    try:
        yield
    finally:
        set_client_factory(usual)


def noting(hook: Callable[[Any], None], message: Any) -> None:
    """Call ``hook``; its error knows whether the question was for names."""
    try:
        hook(message)
    except NoAnswer as error:
        error.listing = "/api/" in message.url.path
        raise


class Watch:
    """Hooks of an HTTP client (httpx's) that follow the answers of one download."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.asked: float | None = None  # when the first request without answer went

    def before(self, request: Any) -> None:
        """Give up after a long silence; no request may wait longer than that."""
        now = time.monotonic()
        self.asked = self.asked or now
        if (silence := now - self.asked) > self.patience:
            raise NoAnswer(f"{request.url.host} has been silent for {silence:.0f} s")
        limits = request.extensions.get("timeout") or {}
        kinds = ("connect", "read", "write", "pool")
        third = self.patience / 3
        timeouts = {kind: min(limits.get(kind) or third, third) for kind in kinds}
        request.extensions = {**request.extensions, "timeout": timeouts}
        request.headers["accept-encoding"] = "identity"  # a bomb is small while packed

    def after(self, response: Any) -> None:
        """Refuse long waits, bad names, and answers that are no hub's, or too long."""
        self.asked = None
        host, headers = response.url.host, response.headers
        wait = asked_to_wait(headers)
        if wait > self.patience:
            what = f"{host} answers {response.status_code} and asks to wait {wait} s"
            raise NoAnswer(f"{what}; try again later")
        self.bound(response)
        if response.status_code >= 400:
            return
        if "/api/" in response.request.url.path:
            judge(response, headers)
        if response.request.method == "HEAD":
            tag = headers.get("x-linked-etag", headers.get("etag"))
            check_name(host, tag, r'(W/)?"?[\w=+-][\w.=+-]*"?')
            check_name(host, headers.get("x-repo-commit"), "[0-9a-f]{40}")

    def bound(self, response: Any) -> None:
        """Pace an answer; what has no length, or is read whole, has an end as well."""
        host, headers, read = response.url.host, response.headers, response.read
        if (packed := headers.get("content-encoding", "identity")) != "identity":
            raise NoAnswer(f"{host} answers in {excerpt(packed)}; expected plain bytes")
        paced = partial(self.paced, host, response.iter_raw)
        limit = None if "content-length" in headers else LONGEST
        response.iter_raw = partial(paced, limit)

        def read_whole() -> bytes:
            response.iter_raw = partial(paced, LONGEST)
            return read()

        response.read = read_whole

    def paced(
        self, host: str, chunks: Callable[[], Iterator[bytes]], limit: int | None
    ) -> Iterator[bytes]:
        """The bytes of an answer, as long as enough of them come, and not too many."""
        began, size, whole = time.monotonic(), 0, 0
        for chunk in chunks():
            self.asked, now = None, time.monotonic()
            size, whole = size + len(chunk), whole + len(chunk)
            if limit and whole > limit:
                raise NoAnswer(f"{host} answers more than {limit:,} bytes; no end seen")
            if (passed := now - began) > self.patience:
                if size < SLOWEST * passed:
                    what = f"{size:,} bytes in {passed:.0f} s"
                    raise NoAnswer(f"{host} is too slow: {what}")
                began, size = now, 0
            yield chunk


def asked_to_wait(headers: Any) -> int:
    """Seconds that an answer asks to wait before the next request."""
    wait = headers.get("retry-after", "")
    limited = re.search(r"\bt=(\d+)", headers.get("ratelimit", ""))
    times = [wait if wait.isdecimal() else "", limited[1] if limited else ""]
    return max(int(seconds[:9] or 0) for seconds in times)


def judge(response: Any, headers: Any) -> None:
    """Raise NoAnswer unless an answer of the hub's interface is what was asked for."""
    host, path = response.url.host, response.request.url.path
    if response.has_redirect_location:
        if "/api/" not in headers["location"]:
            raise no_hub(host, f"leads to {headers['location']}")
        return
    try:
        content = json.loads(response.read())
    except (ValueError, RecursionError):
        kind = headers.get("content-type", "no kind")
        raise no_hub(host, f"answers {response.status_code} with {kind}") from None
    names = names_in(content, path)
    if names is None:
        raise no_hub(host, f"answers {content!r}")
    for name in names:
        if {"..", ""} & set(name.split("/")) or "\\" in name:
            what = f"{host} lists {excerpt(repr(name))}"
            raise NoAnswer(f"{what}; expected a file inside its folder")


def names_in(content: Any, path: str) -> list[str] | None:
    """The files that an answer to ``path`` lists; None for no such answer."""
    key, listed = "path", content or None
    if "/tree/" not in path:
        if not isinstance(content, dict):
            return None
        if "/revision/" in path and not re.fullmatch(
            "[0-9a-f]{40}", str(content.get("sha"))
        ):
            return None
        key, listed = "rfilename", content.get("siblings") or []
    if not isinstance(listed, list):
        return None
    names: list[Any] = [f.get(key) if isinstance(f, dict) else None for f in listed]
    return names if all(isinstance(name, str) for name in names) else None


def no_hub(host: str, what: str) -> NoAnswer:
    """What to say of an answer that no hub gives."""
    found = f"{host} {excerpt(what)}"
    return NoAnswer(f"{found}, which no hub does; a login page of the network, perhaps")


def check_name(host: str, name: str | None, known: str) -> None:
    """Raise NoAnswer for a name of the hub's that would lead out of the cache."""
    if name is not None and not re.fullmatch(known, name):
        raise NoAnswer(f"{host} names a file {excerpt(repr(name))}; expected its hash")


# Downloads


def download_model(
    name: str,
    t5: bool = True,
    check_all: bool = False,
    weights: bool = True,
    revision: str | None = None,
    variant: str | None = None,
    patience: float | None = None,
) -> Path:
    """The local folder of a hub repository or alias, downloaded where it is not yet.

    Only the files of the diffusers layout are fetched, those of a published model at
    its pinned ``revision`` (a branch, tag or commit); T5's weights only if ``t5``, none
    without ``weights``, and of a ``variant`` such as "fp16" where parts have it. A
    broken connection is taken up again where it broke; after an interruption only the
    files that are missing are fetched. What was fetched is verified, with ``check_all``
    what was here before too. Raises OSError saying what is needed where the hub cannot
    be reached, refuses, or is silent for ``patience`` seconds.
    """
    from huggingface_hub import HfApi

    began = time.time()
    check_word("revision", revision)
    check_word("variant", variant)
    name, repository, revision = find_repository(name, revision)
    kinds = KINDS if weights else ["*.json"]
    wanted = [f"{part}/{kind}" for part in COMPONENTS for kind in kinds]
    unwanted = [*LEFT_OUT] if t5 else [*LEFT_OUT, "text_encoder_3/*"]
    try:
        with judged(patience):
            if variant and weights:
                names = HfApi().list_repo_files(repository, revision=revision)
                unwanted += others(names, variant)
                unwanted = [kind for kind in unwanted if kind != f"*.{variant}*"]
            folder = fetch(repository, revision, wanted, unwanted)
    except Exception as error:
        raise explained(error, name, repository, revision) from None
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{repository} has no model_index.json: no pipeline")
    verify(folder, 0 if check_all else began)
    return folder


def find_repository(
    name: str, revision: str | None = None
) -> tuple[str, str, str | None]:
    """A model's name here, its repository, and which commit, tag or branch of it."""
    if known := named(name):
        return known.name, known.repository, revision or known.revision
    return name, name, revision


def find_cached(name: str) -> Path | None:
    """The folder of a repository or alias as far as it was downloaded; None: not yet.

    The hub is not asked.
    """
    from huggingface_hub import try_to_load_from_cache

    _, repository, revision = find_repository(name)
    index = try_to_load_from_cache(repository, INDEX, revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def access(name: str, patience: float = 10) -> str:
    """Whether the hub would give the files of a model, in a line.

    A silent hub is waited for for ``patience`` seconds.
    """
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url

    name, repository, revision = find_repository(name)
    token = get_token()
    url = hf_hub_url(repository, INDEX, revision=revision)
    try:
        with judged(patience):
            get_hf_file_metadata(url, token=token)
    except Exception as error:
        chain = list(causes(error))
        if any(getattr(cause, "response", None) for cause in chain):
            return str(explained(error, name, repository, revision))
        return f"no answer ({type(chain[-1]).__name__}): offline, or not reachable"
    return f"{repository}: its files can be fetched{' with this token' * bool(token)}"


def check_word(option: str, value: str | None) -> None:
    """Raise ValueError for what leads out of a folder, or is no name of its kind."""
    if value is not None and (not re.fullmatch(r"[\w./-]+", value) or ".." in value):
        raise ValueError(f"{option} is {excerpt(repr(value))}; expected a name")


def fetch(
    repository: str, revision: str | None, wanted: list[str], unwanted: list[str]
) -> Path:
    """The snapshot's folder; where the hub gives no answer, one that is whole here."""
    from huggingface_hub import snapshot_download

    files: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": ["model_index.json", *wanted],
        "ignore_patterns": unwanted,
    }
    try:
        return Path(snapshot_download(repository, **files))
    except NoAnswer as error:
        if not error.listing:
            raise
        try:
            return Path(snapshot_download(repository, local_files_only=True, **files))
        except OSError:
            raise error from None


def others(names: Collection[str], variant: str) -> list[str]:
    """The weights that give way to those of a ``variant`` in the same folder.

    Raises ValueError where no file is of that variant.
    """
    weights = [name for name in names if ".safetensors" in name]
    chosen = {name for name in weights if of_variant(name, variant)}
    if not chosen:
        raise ValueError(f"variant is {variant!r}; the repository has no such weights")
    parts = {Path(name).parent for name in chosen}
    return [n for n in weights if n not in chosen and Path(n).parent in parts]


# What went wrong


def explained(
    error: Exception, name: str, repository: str, revision: str | None
) -> Exception:
    """What to raise in place of an error of huggingface_hub's or its client's."""
    from huggingface_hub import errors

    chain = list(causes(error))
    answers = (getattr(cause, "response", None) for cause in chain)
    status = next((answer.status_code for answer in answers if answer), None)
    told = str(chain[-1]).split("\n")[0]
    reason = f"{type(chain[-1]).__name__}: {excerpt(told)}"
    absent = f"{name} is not on this machine and cannot be fetched"
    if status:
        return refused(error, status, name, repository, revision)
    if isinstance(chain[-1], NoAnswer):
        return NoAnswer(f"{absent}: {chain[-1]}")
    if isinstance(error, OSError) and error.errno:  # no room, not permitted, …
        what = f"{repository} cannot be kept: {error.strerror}"
        return OSError(f"{what} ({error.filename or 'the cache'})")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        offline = isinstance(chain[-1], errors.OfflineModeIsEnabled)
        needed = needs(repository) if offline else "it needs a network"
        return ConnectionError(f"{absent} ({reason}): {needed}")
    client = type(error).__module__.startswith("httpx")  # or its successor
    if client or type(error) in (OSError, RuntimeError):  # of a size, and Xet's
        return ConnectionError(
            f"the download of {repository} was interrupted ({reason}); asked for "
            "again, it fetches the files that are missing"
        )
    return error


def refused(
    error: Exception, status: int, name: str, repository: str, revision: str | None
) -> OSError:
    """The error for an answer of the hub that is none of a file."""
    from huggingface_hub import errors

    told = f"the hub answers {status}"
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{repository} has no revision {revision!r}: {told}")
    if status in (401, 403):
        gated = isinstance(error, errors.GatedRepoError)
        what = "is gated" if gated else "is not on the hub, or not for you"
        return PermissionError(f"{repository} {what} ({told}): {needs(repository)}")
    if status == 404:
        return FileNotFoundError(f"{name} is not on the hub: {told}")
    what = f"{name} is not on this machine and cannot be fetched: {told}"
    return ConnectionError(f"{what}; try again later")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what caused it."""
    while error:
        yield error
        error = error.__cause__


def verify(folder: Path, since: float = 0) -> None:
    """Raise ValueError naming the first file in ``folder`` that is damaged.

    A file's hash must be what the hub published: its cache names each file after it,
    where a file system has links; else weights must have the size that their header
    says. A damaged file is deleted. Files that were written before ``since`` (seconds
    since the epoch) are left out.
    """
    for file in sorted((*folder.glob("*/*"), *folder.glob("*.json"))):
        stored = file.resolve()
        if not stored.is_file() or stored.stat().st_mtime < since:
            continue
        if not re.fullmatch(HASH, stored.name):
            if file.suffix == ".safetensors":  # not from the hub's cache
                open_tensors(file)
            continue
        kind, found = file_hash(stored, len(stored.name) == 40)
        if found != stored.name:
            raise ValueError(
                f"{file} is damaged: its {kind} begins with {found[:10]}, the hub's "
                f"with {stored.name[:10]}; {discarded(stored)}; download it again"
            )


def identify(file: Path) -> tuple[str, str, str | None]:
    """A file's kind of hash, its hash, and the one that the hub published, if known."""
    name = file.resolve().name
    published = name if re.fullmatch(HASH, name) else None
    return *file_hash(file, len(name) == 40 and bool(published)), published


def file_hash(file: Path, small: bool) -> tuple[str, str]:
    """The hash by which the hub knows a file: SHA-256, or git's of a ``small`` one."""
    with file.open("rb") as stream:
        if not small:
            return "SHA-256", hashlib.file_digest(stream, "sha256").hexdigest()
        content = stream.read()
    return "SHA-1", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def discarded(file: Path) -> str:
    """Delete ``file``, which the next download would trust; what there is to tell."""
    try:
        file.unlink()
    except OSError:  # a cache that is read-only, or shared
        return f"delete {file}"
    return "it was deleted"


def needs(repository: str) -> str:
    """What it takes to download a gated repository, in one line."""
    return (
        f"it needs a network, the licence accepted at https://huggingface.co/{repository}"
        " and a token of that account with the right to read gated repositories "
        "(`hf auth login`, or HF_TOKEN in the environment)"
    )
