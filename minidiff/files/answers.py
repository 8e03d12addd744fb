"""What a hub answers, judged before it is used: in time, of its kind, with safe names.

huggingface_hub asks and retries; its client's hooks are the place to look.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from minidiff.files.reading import excerpt

PATIENCE = 30.0  # seconds without an answer
SLOWEST = 1_000  # bytes a second
LONGEST = 20_000_000  # bytes, where an answer does not say how many it has


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

    def after(self, response: Any) -> None:
        """Refuse long waits, bad names, and answers that are no hub's."""
        self.asked = None
        host, headers = response.url.host, response.headers
        wait = asked_to_wait(headers)
        if wait > self.patience:
            what = f"{host} answers {response.status_code} and asks to wait {wait} s"
            raise NoAnswer(f"{what}; try again later")
        limit = None if "content-length" in headers else LONGEST
        response.iter_raw = partial(self.paced, host, response.iter_raw, limit)
        if response.status_code >= 400:
            return
        if "/api/" in response.request.url.path:
            judge(response, headers)
        if response.request.method == "HEAD":
            tag = headers.get("x-linked-etag", headers.get("etag"))
            check_name(host, tag, r'(W/)?"?[\w=+-][\w.=+-]*"?')
            check_name(host, headers.get("x-repo-commit"), "[0-9a-f]{40}")

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
