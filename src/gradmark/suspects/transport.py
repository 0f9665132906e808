"""HTTP with patience: retries, pauses that the server asks for, a limit on the rate. Knows no API.

Connection failures, timeouts, 429, 500, 502, 503 and 504 are retried with growing, jittered pauses
(``Retry-After`` is obeyed up to 60 s); any other status is final. Needs ``gradmark[http]``.
"""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from gradmark.errors import EndpointError, UsageError
from gradmark.suspects.checks import brief
from gradmark.suspects.discretion import discreet

_RETRIED = {429, 500, 502, 503, 504}
_LONGEST_PAUSE = 60.0
_LARGEST_ANSWER = 64 * 2**20
_PATIENCE = 10  # timeouts that a whole answer may take
_READ, _QUOTED = 4000, 200  # bytes of a refusal that are looked at, and characters that are told
_FIXES = {
    401: "Give the endpoint's credentials as a header",
    403: "Check the endpoint's credentials",
    404: "Check the address",
    405: "The endpoint must take POST requests",
    413: "Use a smaller batch size",
}


@dataclass(frozen=True)
class Answer:
    """The body of a successful answer, and its headers by lower-case name."""

    body: bytes
    headers: Mapping[str, str]


class Transport:
    """Requests to the server called ``name`` in errors, which show no header. ``retries`` counts repetitions.

    ``timeout``: seconds that the server may be silent; a whole answer may take ten times as long. ``rate``:
    at most so many requests a second, None for any number. ``sleep`` replaces ``time.sleep``.
    """

    def __init__(
        self,
        name: str,
        *,
        timeout: float = 30.0,
        attempts: int = 6,
        rate: float | None = None,
        headers: Mapping[str, str] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Raises UsageError on numbers without sense, or where a package is missing."""
        if attempts < 1 or timeout <= 0 or (rate is not None and rate <= 0):
            raise UsageError("Attempts, timeout and rate must be positive")
        self.name, self.attempts, self.retries = name, attempts, 0
        self._gap, self._sleep = 0.0 if rate is None else 1 / rate, sleep
        self._client, self._headers = _client(timeout, headers), dict(headers or {})
        self._longest = _PATIENCE * timeout
        self._lock = threading.Lock()
        self._free = 0.0
        """When the next request may start, by the monotonic clock."""

    def close(self) -> None:
        self._client.close()

    def send(
        self, method: str, url: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """The answer, after as many attempts as it takes and is allowed. EndpointError where it fails."""
        import tenacity

        jitter = tenacity.wait_random_exponential(multiplier=0.5, max=30)

        def repeat(state: tenacity.RetryCallState) -> None:
            with self._lock:
                self.retries += 1

        def pause(state: tenacity.RetryCallState) -> float:
            failure = state.outcome.exception() if state.outcome else None
            asked = failure.after if isinstance(failure, _Passing) else None
            if asked is None:
                return jitter(state)
            return min(asked, _LONGEST_PAUSE)

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=pause,
            retry=tenacity.retry_if_exception_type(_Passing),
            sleep=self._sleep,
            before_sleep=repeat,
            reraise=True,
        )
        try:
            return retrying(self._once, method, url, body, headers or {})
        except _Passing as cause:
            raise EndpointError(
                f"{self.name} kept failing in {self.attempts} attempts",
                found=cause.what,
                fix="Try again later; with a journal, nothing is asked twice",
            ) from cause

    def _once(self, method: str, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        import httpx2

        self._wait()
        try:
            status, answered, content = self._in_time(method, url, body, headers)
        except httpx2.LocalProtocolError:  # whose text may quote a header, which may be a secret
            raise EndpointError(
                f"{self.name} can't be asked", found="a header or address HTTP forbids"
            ) from None
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as cause:
            raise EndpointError(f"{self.name} can't be asked", found=self.public(url, brief(cause))) from None
        except httpx2.TransportError as cause:
            raise _Passing(self.public(url, brief(cause))) from cause
        except (httpx2.HTTPError, zlib.error) as cause:  # its encoding is broken, too many redirects
            raise EndpointError(f"{self.name} gave a broken answer", found=brief(cause)) from cause
        if status in _RETRIED or not 200 <= status < 300:
            text = self.public(url, content[:_READ].decode("utf-8", "replace"))[:_QUOTED].strip()
            found = f"status {status}: {text}"
            if status in _RETRIED:
                raise _Passing(found, _retry_after(answered.get("retry-after")))
            raise EndpointError(
                f"{self.name} refused", expected="status 200", found=found, fix=_FIXES.get(status, "")
            )
        return Answer(content, answered)

    def _in_time(
        self, method: str, url: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body, if all of them come in time.

        Asked in a thread of its own, since a server may drip for ever without being silent for long; one
        that doesn't come back is left behind.
        """
        found: queue.Queue[Any] = queue.Queue()

        def ask() -> None:
            try:
                with self._client.stream(method, url, content=body, headers=headers) as response:
                    answered = {key.lower(): value for key, value in response.headers.items()}
                    found.put((response.status_code, answered, self._whole(response)))
            except BaseException as error:
                found.put(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            told = found.get(timeout=self._longest)
        except queue.Empty:
            raise _Passing(f"an answer that takes longer than {self._longest:g} s") from None
        if isinstance(told, BaseException):
            raise told
        status, answered, content = told
        return status, answered, content

    def _whole(self, response: Any) -> bytes:
        """The body, if it ends in time and isn't without measure."""
        chunks, size, until = [], 0, time.monotonic() + self._longest
        for chunk in response.iter_raw():
            chunks.append(chunk)
            size += len(chunk)
            if size > _LARGEST_ANSWER:
                raise self._endless()
            if time.monotonic() > until:
                raise _Passing(f"an answer that takes longer than {self._longest:g} s")
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding in ("", "identity"):
            return b"".join(chunks)
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise EndpointError(
                f"{self.name} gave a broken answer", expected="gzip or deflate, as was asked for",
                found=f"the encoding {encoding[:40]}",
            )  # fmt: skip
        return self._unpacked(b"".join(chunks), raw=encoding == "deflate")

    def _unpacked(self, packed: bytes, *, raw: bool) -> bytes:
        """``raw``: what calls itself deflate comes with the format's own header or without."""
        try:
            reader = zlib.decompressobj(32 + zlib.MAX_WBITS)
            content = reader.decompress(packed, _LARGEST_ANSWER)
        except zlib.error:
            if not raw:
                raise
            reader = zlib.decompressobj(-zlib.MAX_WBITS)
            content = reader.decompress(packed, _LARGEST_ANSWER)
        if reader.unconsumed_tail:
            raise self._endless()
        return content

    def _endless(self) -> EndpointError:
        return EndpointError(f"{self.name} answers without end", expected="64 MiB at most")

    def public(self, url: str, text: str) -> str:
        """``text``, which others wrote and may quote what they were sent, without anything secret."""
        return discreet(text, url, self._headers)

    def _wait(self) -> None:
        """Until this request's turn has come."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._free)
            self._free = turn + self._gap
        if turn > now:
            self._sleep(turn - now)


class _Passing(Exception):
    """A failure that may pass; ``after``: the seconds that the endpoint asks to wait."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.what, self.after = what, after


def _client(timeout: float, headers: Mapping[str, str] | None) -> Any:
    try:
        import httpx2
        import tenacity  # noqa: F401
    except ImportError as cause:
        fix = "pip install gradmark[http]"
        raise UsageError(
            "Asking an endpoint needs httpx2 and tenacity, which aren't installed", fix=fix
        ) from cause
    given = {"content-type": "application/json", "accept-encoding": "gzip, deflate", **(headers or {})}
    return httpx2.Client(timeout=timeout, headers=given)


def shown(url: str) -> str:
    """The address without user, password and query, which may be secret. UsageError if it is none."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # whose text may quote a password
        raise UsageError(
            "The endpoint's address can't be read",
            expected="http://HOST:PORT/PATH, with / ? # @ in a user's name or password as %2F %3F %23 %40",
        ) from None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError("The endpoint's address isn't one", expected="http://... or https://...")
    host = f"[{host}]" if ":" in host else host
    return urlunsplit((parts.scheme, host if port is None else f"{host}:{port}", parts.path, "", ""))


def public_name(source: str) -> str:
    """What a user named, as anybody may see it: an address by :func:`shown`, anything else as it is."""
    return shown(source) if source.startswith(("http://", "https://")) else source


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or an HTTP date; None where the header is missing or unreadable."""
    if not value:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
