"""Plain JSON: ``{"inputs": [...]}`` in, ``{"outputs": [[score, ...], ...]}`` out.

The answer may be the bare list of rows, or name it as one of :data:`ANSWERS`. Inputs are nested lists
of numbers, written so that float32 survives exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradmark.suspects.apis import BadAnswer, Get
from gradmark.suspects.transport import Answer

ANSWERS: tuple[str, ...] = ("outputs", "probabilities", "probs", "logits", "scores", "predictions")
ANSWERS += ("output", "prediction", "predict", "result", "results")


@dataclass(frozen=True)
class PlainJson:
    """``field``: the name under which inputs are sent."""

    field: str = "inputs"

    identity: str = ""
    most: int | None = None

    def prepared(self, url: str, get: Get) -> PlainJson:
        return self

    def request(self, url: str, x: Tensor) -> tuple[str, bytes, Mapping[str, str]]:
        return url, json.dumps({self.field: x.tolist()}, allow_nan=False).encode(), {}

    def rows(self, answer: Answer, b: int) -> Any:
        out = parsed(answer.body, '{"outputs": [[...]]}')
        if isinstance(out, dict):
            name = next((name for name in ANSWERS if name in out), None)
            if name is None:
                found = "fields " + (", ".join(map(repr, list(out)[:5])) or "none")
                raise BadAnswer("gave no scores", "a field 'outputs'", found[:200])
            out = out[name]
        if not isinstance(out, list):
            raise BadAnswer("gave no scores", "a list of rows", type(out).__name__)
        return out


def parsed(body: bytes, expected: str) -> Any:
    """The JSON value in ``body``. BadAnswer where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as cause:
        raise BadAnswer("gave no JSON", expected, repr(body[:200].decode("utf-8", "replace"))) from cause
