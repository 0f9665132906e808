"""OpenAI-compatible completions with log-probabilities: language models that classify by prompting.

Speaks to ``/v1/completions`` (``logprobs``) and to ``/v1/chat/completions`` (``top_logprobs``): which of the
two, the address tells. The scores of a prompt are the log-probabilities of given candidate tokens as what
comes next. A server shows the likeliest tokens alone; a candidate that it doesn't show reads as unlikely as
the unlikeliest that it does, so that two such candidates are a tie.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmark.codec import canonical_json
from gradmark.errors import EndpointError, UsageError
from gradmark.suspects.apis import BadAnswer, Get, refusal
from gradmark.suspects.apis.plain import parsed
from gradmark.suspects.checks import check_scores
from gradmark.suspects.journal import Journal
from gradmark.suspects.transport import Answer, Transport, shown

_SHAPE = "choices with logprobs"


@dataclass(frozen=True)
class Prompted:
    """An API for arrays of numbers: ``prompt`` is a text with ``{input}`` in it, where an input's numbers are
    put, apart by commas, to ``digits`` significant digits. ``candidates``: one token a class, as the
    tokenizer spells it, most often with a space before it. ``top``: how many tokens the server is asked for.
    """

    model: str
    prompt: str
    candidates: tuple[str, ...]
    top: int = 20
    digits: int = 6
    identity: str = ""
    most: int | None = 1

    def prepared(self, url: str, get: Get) -> Prompted:
        return self

    def request(self, url: str, x: Tensor) -> tuple[str, bytes, Mapping[str, str]]:
        numbers = ", ".join(f"{v:.{self.digits}g}" for v in x[0].flatten().tolist())
        text = self.prompt.replace("{input}", numbers)
        return url, question(url, self.model, [text], self.top), {}

    def rows(self, answer: Answer, b: int) -> list[list[float]]:
        return candidate_rows(answer.body, self.candidates, b)


class Completions:
    """Log-probabilities of texts from the endpoint at ``url``, with patience and a journal.

    ``model``: the name the server knows it by. Other options as for HttpSuspect. ``queries`` counts the
    prompts answered in this run, ``reused`` those taken from the journal.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        top: int = 20,
        batch_size: int = 16,
        journal: Path | None = None,
        headers: Mapping[str, str] | None = None,
        **patience: Any,
    ) -> None:
        self.name = shown(url)
        if min(top, batch_size) < 1:
            raise UsageError("The number of tokens and of prompts in a request must be positive")
        self.url, self.model, self.top = url, model, top
        self.batch_size = 1 if _chats(url) else batch_size
        self.queries = self.reused = 0
        self._journal = Journal(Path(journal), f"{url}#{model}") if journal is not None else None
        self._transport = Transport(self.name, headers=headers, **patience)

    def close(self) -> None:
        self._transport.close()

    def candidates(self, prompts: Sequence[str], tokens: Sequence[str]) -> Tensor:
        """Log-probabilities (b, C) of each of ``tokens`` as what follows each of ``prompts``."""
        found: dict[str, list[float]] = {}
        for part in self._unknown(prompts, ["next", self.top, *tokens], found):
            body = question(self.url, self.model, part, self.top)
            self._take(
                body,
                part,
                found,
                lambda answer, b: candidate_rows(answer, tokens, b),
                ["next", self.top, *tokens],
            )
        return check_scores([found[p] for p in prompts], len(prompts), len(tokens), self.name, EndpointError)

    def echo(self, prompts: Sequence[str]) -> list[Tensor]:
        """Log-probability of every token of each prompt but its first, given those before it."""
        if _chats(self.url):
            raise UsageError("Chats don't tell the probabilities of a prompt", expected=".../v1/completions")
        found: dict[str, list[float]] = {}
        for part in self._unknown(prompts, ["echo"], found):
            body = question(self.url, self.model, part, 1, echo=True)
            self._take(body, part, found, echoed, ["echo"])
        return [torch.tensor(found[p], dtype=torch.float32) for p in prompts]

    def _unknown(
        self, prompts: Sequence[str], kind: list[Any], found: dict[str, list[float]]
    ) -> Iterator[list[str]]:
        """The prompts that nobody asked yet, in batches; what the journal knows goes into ``found``."""
        todo = []
        for prompt in dict.fromkeys(prompts):
            known = self._journal.get(self._key(prompt, kind)) if self._journal is not None else None
            if known is None:
                todo.append(prompt)
            else:
                found[prompt] = known
                self.reused += 1
        for i in range(0, len(todo), self.batch_size):
            yield todo[i : i + self.batch_size]

    def _take(
        self, body: bytes, part: list[str], found: dict[str, list[float]], read: Any, kind: list[Any]
    ) -> None:
        answer = self._transport.send("POST", self.url, body)
        try:
            rows: list[list[float]] = read(answer.body, len(part))
        except BadAnswer as cause:
            raise refusal(cause, self._transport, self.url) from None
        if self._journal is not None:
            for prompt, row in zip(part, rows, strict=True):
                self._journal.add([self._key(prompt, kind)], torch.tensor([row], dtype=torch.float64))
        self.queries += len(part)
        found.update(zip(part, rows, strict=True))

    def _key(self, prompt: str, kind: list[Any]) -> str:
        return Journal.hashed(f"{self.url}#{self.model}".encode(), canonical_json([*kind, prompt]))


def question(url: str, model: str, prompts: list[str], top: int, *, echo: bool = False) -> bytes:
    """The body that asks for the ``top`` likeliest next tokens, or for the prompts' own probabilities."""
    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 0 if echo else 1}
    if _chats(url):
        body |= {"messages": [{"role": "user", "content": prompts[0]}], "logprobs": True, "top_logprobs": top}
    else:
        body |= {"prompt": prompts, "logprobs": top, "echo": echo}
    return json.dumps(body).encode()


def candidate_rows(body: bytes, candidates: Sequence[str], b: int) -> list[list[float]]:
    """Log-probabilities (b, C) in an answer. BadAnswer where it holds none, or shows no candidate."""
    rows = []
    for choice in _choices(body, b):
        try:
            said = choice["logprobs"]
            if "content" in said:
                top = {entry["token"]: entry["logprob"] for entry in said["content"][0]["top_logprobs"]}
            else:
                top = said["top_logprobs"][0]
            known = {str(token): float(value) for token, value in top.items()}
        except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError) as cause:
            raise BadAnswer("gave no log-probabilities", _SHAPE) from cause
        if not known or not all(map(math.isfinite, known.values())):
            raise BadAnswer("gave no log-probabilities", "finite numbers", str(list(known)[:5]))
        least = min(known.values())
        rows.append([known.get(token, least) for token in candidates])
    return rows


def echoed(body: bytes, b: int) -> list[list[float]]:
    """Log-probabilities of the tokens of ``b`` prompts, but for each one's first."""
    rows = []
    for choice in _choices(body, b):
        try:
            found = [float(value) for value in choice["logprobs"]["token_logprobs"][1:]]
        except (KeyError, TypeError, ValueError, OverflowError) as cause:
            raise BadAnswer("gave no log-probabilities of the prompt", _SHAPE) from cause
        if not all(map(math.isfinite, found)):
            raise BadAnswer("gave no log-probabilities of the prompt", "finite numbers")
        rows.append(found)
    return rows


def prompted(tables: dict[str, Any], name: str) -> Prompted:
    """From a mapping file's section ``[completions]``. UsageError where it makes no sense."""
    given = tables["completions"]
    known = {"model", "prompt", "candidates", "top", "digits"}
    good = isinstance(given, dict) and set(tables) == {"completions"} and set(given) <= known
    if (
        not good
        or not {"model", "prompt", "candidates"} <= set(given)
        or "{input}" not in str(given["prompt"])
    ):
        raise UsageError(
            f"The mapping {name} makes no sense",
            expected="[completions] with model, prompt with {input} in it, candidates, perhaps top, digits",
        )
    candidates = given["candidates"]
    if (
        not isinstance(candidates, list)
        or len(set(map(str, candidates))) != len(candidates)
        or not candidates
    ):
        raise UsageError(
            f"The mapping {name} makes no sense", expected="candidates: one token for each class"
        )
    identity = hashlib.sha256(canonical_json(tables)).hexdigest()
    return Prompted(
        str(given["model"]), str(given["prompt"]), tuple(map(str, candidates)), int(given.get("top", 20)),
        int(given.get("digits", 6)), identity,
    )  # fmt: skip


def _choices(body: bytes, b: int) -> list[Any]:
    said = parsed(body, _SHAPE)
    choices = said.get("choices") if isinstance(said, dict) else None
    if not isinstance(choices, list) or len(choices) != b or not all(isinstance(c, dict) for c in choices):
        found = f"{len(choices)} choices" if isinstance(choices, list) else "none"
        raise BadAnswer("gave no completions", f"{b} choices", found)
    places = [choice.get("index", 0) for choice in choices]
    if not all(isinstance(place, int) for place in places):
        raise BadAnswer("gave no completions", "choices with numbers", str(places)[:80])
    return [choice for _, choice in sorted(zip(places, choices, strict=True), key=itemgetter(0))]


def _chats(url: str) -> bool:
    return url.partition("?")[0].rstrip("/").endswith("/chat/completions")
