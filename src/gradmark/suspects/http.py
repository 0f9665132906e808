"""An HTTP prediction endpoint as a suspect: batches, a budget, several requests at once, a journal.

How inputs and scores are written is the API's affair (:mod:`gradmark.suspects.apis`), and what goes
wrong on the way that of :mod:`gradmark.suspects.transport`. Needs ``gradmark[http]``.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from gradmark.errors import EndpointError, UsageError
from gradmark.suspects.apis import Api, BadAnswer, refusal
from gradmark.suspects.apis.plain import PlainJson
from gradmark.suspects.checks import check_inputs, check_scores
from gradmark.suspects.journal import Journal
from gradmark.suspects.transport import Answer, Transport, shown


class HttpSuspect:
    """Black-box access to the endpoint at ``url``.

    ``queries`` counts the inputs sent in this run, ``reused`` those taken from the journal and
    ``retries`` the requests that had to be repeated. ``api``: what it speaks, plain JSON unless said.
    ``concurrency`` requests are under way at once, ``rate`` of them start in a second at most, and no
    more than ``budget`` inputs are sent. ``sleep`` replaces ``time.sleep``. Headers may hold a secret:
    no error, name or journal shows them, nor the user and query part of the address.
    """

    def __init__(
        self,
        url: str,
        *,
        api: Api | None = None,
        batch_size: int = 64,
        timeout: float = 30.0,
        attempts: int = 6,
        concurrency: int = 1,
        rate: float | None = None,
        budget: int | None = None,
        journal: Path | None = None,
        input_field: str = "inputs",
        headers: Mapping[str, str] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Sends nothing yet. Raises UsageError on a bad address or number."""
        self.name = shown(url)
        if min(batch_size, attempts, concurrency) < 1 or timeout <= 0:
            raise UsageError("Batch size, attempts, concurrency and timeout must be positive")
        self.url, self.api = url, api or PlainJson(input_field)
        self.digest = "sha256:" + hashlib.sha256(url.encode()).hexdigest()
        self.batch_size, self.concurrency, self.budget = batch_size, concurrency, budget
        self.queries = self.reused = self._under_way = 0
        asked = f"{url}#{self.api.identity}" if self.api.identity else url
        self._journal = Journal(Path(journal), asked) if journal is not None else None
        self._transport = Transport(
            self.name, timeout=timeout, attempts=attempts, rate=rate, headers=headers, sleep=sleep
        )
        self._lock = threading.RLock()
        self._prepared: Api | None = None
        self._n_classes: int | None = None

    def __repr__(self) -> str:
        return f"HttpSuspect({self.name!r})"

    @property
    def retries(self) -> int:
        return self._transport.retries

    def close(self) -> None:
        """Close the connections; the suspect can't be asked after it."""
        self._transport.close()

    def query(self, x: Tensor) -> Tensor:
        """Scores (b, C), float32 on the CPU, of inputs (b, *shape).

        Raises EndpointError where the endpoint fails for good; answers that came before are in the
        journal.
        """
        x = check_inputs(x, self.name).to(device="cpu", dtype=torch.float32)
        if self._journal is None:
            return torch.cat(self._ask_all([(part, None) for part in torch.split(x, self._most())]))
        keys = [self._journal.key(row) for row in x]
        missing: dict[str, int] = {}
        for i, key in enumerate(keys):
            if self._journal.get(key) is None:
                missing.setdefault(key, i)
        todo = list(missing.items())
        size = self._most() if todo else 1
        chunks = [todo[i : i + size] for i in range(0, len(todo), size)]
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
        b = x.shape[0]
        self._reserve(b)
        try:
            answer = self._transport.send("POST", *self._speaking().request(self.url, x))
            scores = self._scores(answer, b)
            if self._journal is not None and keys is not None:
                self._journal.add(keys, scores)
            with self._lock:
                self.queries += b
            return scores
        finally:
            with self._lock:
                self._under_way -= b

    def _most(self) -> int:
        return min(self.batch_size, self._speaking().most or self.batch_size)

    def _speaking(self) -> Api:
        """The API, which may first want to know what the service says of itself; asked for once."""
        with self._lock:
            if self._prepared is None:
                try:
                    self._prepared = self.api.prepared(self.url, lambda url: self._transport.send("GET", url))
                except BadAnswer as cause:
                    raise refusal(cause, self._transport, self.url) from None
            return self._prepared

    def _reserve(self, b: int) -> None:
        with self._lock:
            asked = self.queries + self._under_way
            if self.budget is not None and asked + b > self.budget:
                raise EndpointError(
                    f"{self.name} would be asked more than is allowed",
                    expected=f"{self.budget} inputs at most",
                    found=f"{asked} asked, {b} more wanted",
                )
            self._under_way += b

    def _scores(self, answer: Answer, b: int) -> Tensor:
        try:
            out = self._speaking().rows(answer, b)
        except BadAnswer as cause:
            raise refusal(cause, self._transport, self.url) from None
        scores = check_scores(out, b, self._n_classes, self.name, EndpointError)
        self._n_classes = scores.shape[1]
        return scores
