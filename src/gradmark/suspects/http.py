"""An HTTP prediction endpoint as a suspect.

The wire format is what most prediction services speak or can be made to speak with ten lines:

    POST <url>                       {"inputs": [<input>, ...]}      nested lists, one per input
    200                              {"outputs": [[score, ...], ...]}   one row per input

The answer may be the bare list of rows, or name it ``outputs``, ``probabilities``, ``probs``,
``logits``, ``scores``, ``predictions``, ``output``, ``prediction``, ``predict``, ``result`` or
``results``. Inputs are sent so that float32 survives exactly.

Connection failures, timeouts, 429, 500, 502, 503 and 504 are retried with growing, jittered pauses
(``Retry-After`` is obeyed up to 60 s); any other status is final. Needs ``gradmark[http]``.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import torch
from torch import Tensor

from gradmark.errors import EndpointError, UsageError
from gradmark.suspects.checks import brief, check_inputs, check_scores
from gradmark.suspects.journal import Journal

_RETRIED = {429, 500, 502, 503, 504}
_ANSWERS: tuple[str, ...] = ("outputs", "probabilities", "probs", "logits", "scores", "predictions")
_ANSWERS += ("output", "prediction", "predict", "result", "results")
_LONGEST_PAUSE = 60.0
_LARGEST_ANSWER = 64 * 2**20


class HttpSuspect:
    """Black-box access to the endpoint at ``url``.

    ``queries`` counts the inputs answered in this run, ``reused`` those taken from the journal and
    ``retries`` the requests that had to be repeated. ``concurrency`` requests are under way at
    once. ``sleep`` replaces ``time.sleep`` between attempts. Headers may hold a secret: no error,
    name or journal shows them, nor the user and query part of the address.
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 64,
        timeout: float = 30.0,
        attempts: int = 6,
        concurrency: int = 1,
        journal: Path | None = None,
        input_field: str = "inputs",
        headers: Mapping[str, str] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Sends nothing yet. Raises UsageError on a bad address or number."""
        self.name = _shown(url)
        if min(batch_size, attempts, concurrency) < 1 or timeout <= 0:
            raise UsageError("Batch size, attempts, concurrency and timeout must be positive")
        self.url = url
        self.digest = "sha256:" + hashlib.sha256(url.encode()).hexdigest()
        self.batch_size, self.attempts, self.concurrency = batch_size, attempts, concurrency
        self.queries = self.reused = self.retries = 0
        self._field, self._sleep = input_field, sleep
        self._journal = Journal(Path(journal), url) if journal is not None else None
        self._client = _client(timeout, headers)
        self._lock = threading.Lock()
        self._n_classes: int | None = None

    def __repr__(self) -> str:
        return f"HttpSuspect({self.name!r})"

    def close(self) -> None:
        """Close the connections; the suspect can't be asked after it."""
        self._client.close()

    def query(self, x: Tensor) -> Tensor:
        """Scores (b, C), float32 on the CPU, of inputs (b, *shape).

        Raises EndpointError where the endpoint fails for good; answers that came before are in the
        journal.
        """
        x = check_inputs(x, self.name).to(device="cpu", dtype=torch.float32)
        if self._journal is None:
            return torch.cat(self._ask_all([(part, None) for part in torch.split(x, self.batch_size)]))
        keys = [self._journal.key(row) for row in x]
        missing: dict[str, int] = {}
        for i, key in enumerate(keys):
            if self._journal.get(key) is None:
                missing.setdefault(key, i)
        todo = list(missing.items())
        chunks = [todo[i : i + self.batch_size] for i in range(0, len(todo), self.batch_size)]
        self._ask_all([(x[[i for _, i in chunk]], [key for key, _ in chunk]) for chunk in chunks])
        self.reused += len(keys) - len(missing)
        return check_scores(
            [self._journal.get(key) for key in keys], len(keys), None, self.name, EndpointError
        )

    def _ask_all(self, parts: list[tuple[Tensor, list[str] | None]]) -> list[Tensor]:
        if self.concurrency == 1 or len(parts) < 2:
            return [self._ask(*part) for part in parts]
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._ask, *part) for part in parts]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what is under way ends and is noted; the rest isn't sent
                raise

    def _ask(self, x: Tensor, keys: list[str] | None) -> Tensor:
        body = json.dumps({self._field: x.tolist()}, allow_nan=False).encode()
        scores = self._scores(self._send(body), x.shape[0])
        if self._journal is not None and keys is not None:
            self._journal.add(keys, scores)
        with self._lock:
            self.queries += x.shape[0]
        return scores

    def _send(self, body: bytes) -> bytes:
        """The body of a successful answer, after as many attempts as it takes and is allowed."""
        import tenacity

        def repeat(state: tenacity.RetryCallState) -> None:
            with self._lock:
                self.retries += 1

        jitter = tenacity.wait_random_exponential(multiplier=0.5, max=30)

        def pause(state: tenacity.RetryCallState) -> float:
            failure = state.outcome.exception() if state.outcome else None
            asked = failure.after if isinstance(failure, _Passing) else None
            return min(asked, _LONGEST_PAUSE) if asked is not None else jitter(state)

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=pause,
            retry=tenacity.retry_if_exception_type(_Passing),
            sleep=self._sleep,
            before_sleep=repeat,
            reraise=True,
        )
        try:
            return retrying(self._post, body)
        except _Passing as cause:
            raise EndpointError(
                f"{self.name} kept failing in {self.attempts} attempts",
                found=cause.what,
                fix="Try again later; with a journal, nothing is asked twice",
            ) from cause

    def _post(self, body: bytes) -> bytes:
        import httpx2

        try:
            with self._client.stream("POST", self.url, content=body) as response:
                answer = b""
                for chunk in response.iter_bytes():
                    answer += chunk
                    if len(answer) > _LARGEST_ANSWER:
                        raise EndpointError(f"{self.name} answers without end", expected="64 MiB at most")
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.InvalidURL) as cause:
            raise EndpointError(f"{self.name} can't be asked", found=brief(cause)) from cause
        except httpx2.TransportError as cause:
            raise _Passing(brief(cause)) from cause
        except httpx2.HTTPError as cause:  # an answer whose encoding is broken, too many redirects
            raise EndpointError(f"{self.name} gave a broken answer", found=brief(cause)) from cause
        status = response.status_code
        text = answer.decode("utf-8", "replace")[:200].strip()
        if status in _RETRIED:
            raise _Passing(f"status {status}: {text}", _retry_after(response.headers.get("retry-after")))
        if not 200 <= status < 300:
            found = f"status {status}: {text}"
            raise EndpointError(
                f"{self.name} refused", expected="status 200", found=found, fix=_FIXES.get(status, "")
            )
        return answer

    def _scores(self, answer: bytes, b: int) -> Tensor:
        try:
            out: Any = json.loads(answer)
        except (ValueError, RecursionError) as cause:
            found = repr(answer[:200].decode("utf-8", "replace"))
            raise EndpointError(
                f"{self.name} gave no JSON", expected='{"outputs": [[...]]}', found=found
            ) from cause
        if isinstance(out, dict):
            name = next((name for name in _ANSWERS if name in out), None)
            if name is None:
                found = "fields " + (", ".join(map(repr, list(out)[:5])) or "none")
                raise EndpointError(
                    f"{self.name} gave no scores", expected="a field 'outputs'", found=found[:200]
                )
            out = out[name]
        if not isinstance(out, list):
            found = type(out).__name__
            raise EndpointError(f"{self.name} gave no scores", expected="a list of rows", found=found)
        scores = check_scores(out, b, self._n_classes, self.name, EndpointError)
        self._n_classes = scores.shape[1]
        return scores


class _Passing(Exception):
    """A failure that may pass; ``after``: the seconds that the endpoint asks to wait."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.what, self.after = what, after


_FIXES = {
    401: "Give the endpoint's credentials as a header",
    403: "Check the endpoint's credentials",
    404: "Check the address",
    405: "The endpoint must take POST requests",
    413: "Use a smaller batch size",
}


def _client(timeout: float, headers: Mapping[str, str] | None) -> Any:
    try:
        import httpx2
        import tenacity  # noqa: F401
    except ImportError as cause:
        fix = "pip install gradmark[http]"
        raise UsageError(
            "Asking an endpoint needs httpx2 and tenacity, which aren't installed", fix=fix
        ) from cause
    return httpx2.Client(timeout=timeout, headers={**(headers or {}), "content-type": "application/json"})


def _shown(url: str) -> str:
    """The address without user, password and query, which may be secret."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as cause:
        raise UsageError("The endpoint's address can't be read", found=brief(cause)) from cause
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError("The endpoint's address isn't one", expected="http://... or https://...")
    host = f"[{host}]" if ":" in host else host
    return urlunsplit((parts.scheme, host if port is None else f"{host}:{port}", parts.path, "", ""))


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or an HTTP date; None where the header is missing or unreadable."""
    if not value:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
