"""Any JSON service, by a file that says where its inputs and its scores are.

``docs/endpoints.md`` documents the file. A path is names joined by dots, ``[0]`` for a place in a list, and
one ``[*]`` where the answers to the inputs of a request stand in a row.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gradmark.codec import canonical_json
from gradmark.errors import UsageError
from gradmark.suspects.apis import Api, BadAnswer, Get
from gradmark.suspects.apis.encodings import ENCODINGS, encoded
from gradmark.suspects.apis.plain import parsed
from gradmark.suspects.transport import Answer

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+|\*)\]")
_REQUEST = {"inputs", "batch", "encode", "item", "range", "layout", "body"}
_RESPONSE = {"scores", "labels", "classes", "label", "score"}
Step = str | int | None
"""A name, a place in a list, or None for every place."""


@dataclass(frozen=True)
class Mapped:
    """What the file says; ``request`` and ``response`` are its two tables, checked."""

    inputs: tuple[Step, ...]
    batch: bool
    encode: str
    item: tuple[Step, ...]
    range: tuple[float, float]
    layout: str
    body: Mapping[str, Any]
    scores: tuple[Step, ...] | None
    labels: tuple[Step, ...] | None
    classes: tuple[str, ...]
    label: str
    score: str
    identity: str = field(default="", repr=False)

    @property
    def most(self) -> int | None:
        return None if self.batch else 1

    def prepared(self, url: str, get: Get) -> Mapped:
        return self

    def request(self, url: str, x: Tensor) -> tuple[str, bytes, Mapping[str, str]]:
        items = [_put({}, self.item, row) for row in encoded(x, self.encode, self.range, self.layout)]
        body = _put(copy.deepcopy(dict(self.body)), self.inputs, items if self.batch else items[0])
        return url, json.dumps(body, allow_nan=False).encode(), {}

    def rows(self, answer: Answer, b: int) -> Any:
        out = parsed(answer.body, "the JSON that the mapping describes")
        path = self.scores if self.scores is not None else self.labels
        found = _dig(out, path or ())
        found = found if path is not None and None in path else [found] if not self.batch else found
        if not isinstance(found, list):
            raise BadAnswer("gave no scores", "a list of answers", type(found).__name__)
        if self.scores is None:
            return [self._one_hot(value) for value in found]
        return [self._row(value) for value in found]

    def _row(self, value: Any) -> Any:
        """Scores in the order of the classes; a class that isn't shown has 0."""
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            value = {str(entry.get(self.label)): entry.get(self.score) for entry in value}
        if not isinstance(value, dict):
            return value
        strangers = sorted(set(value) - set(self.classes))
        if strangers:
            raise BadAnswer("names classes that the mapping doesn't", "its classes", ", ".join(strangers[:5]))
        return [value.get(name, 0.0) for name in self.classes]

    def _one_hot(self, value: Any) -> list[float]:
        place = value if type(value) is int else None
        if isinstance(value, str) and value in self.classes:
            place = self.classes.index(value)
        if place is None or not 0 <= place < len(self.classes):
            raise BadAnswer("names a class that the mapping doesn't", "one of its classes", repr(value)[:80])
        return [float(i == place) for i in range(len(self.classes))]


def load_mapping(path: Path) -> Api:
    """The API that a file describes. UsageError where it can't be read or makes no sense."""
    try:
        content = path.read_bytes()
        toml = path.suffix.lower() == ".toml"
        tables = tomllib.loads(content.decode()) if toml else json.loads(content)
    except (OSError, ValueError, RecursionError) as cause:
        raise UsageError(
            f"The mapping {path.name} can't be read", expected="TOML or JSON", found=str(cause)[:120]
        ) from cause
    if isinstance(tables, dict) and "completions" in tables:
        from gradmark.suspects.apis.completions import prompted

        return prompted(tables, path.name)
    _check(tables, path.name)
    request, response = tables.get("request", {}), tables["response"]
    classes = response.get("classes", [])
    return Mapped(
        inputs=_path(request.get("inputs", "inputs")), batch=request.get("batch", True),
        encode=request.get("encode", "lists"), item=_path(request.get("item", "")),
        range=tuple(request.get("range", (0.0, 1.0))), layout=request.get("layout", "chw"),
        body=request.get("body", {}), scores=_path(response["scores"]) if "scores" in response else None,
        labels=_path(response["labels"]) if "labels" in response else None,
        classes=tuple(map(str, range(classes) if isinstance(classes, int) else classes)),
        label=response.get("label", "label"), score=response.get("score", "score"),
        identity=hashlib.sha256(canonical_json(tables)).hexdigest(),
    )  # fmt: skip


def _check(tables: Any, name: str) -> None:
    whole: dict[str, Any] = tables if isinstance(tables, dict) else {}
    request, response = whole.get("request", {}), whole.get("response")
    tidy = set(whole) <= {"request", "response"}
    if not tidy or not isinstance(request, dict) or not isinstance(response, dict):
        raise UsageError(f"The mapping {name} makes no sense", expected="tables [request] and [response]")
    strange = (set(request) - _REQUEST) | (set(response) - _RESPONSE)
    limits, classes = request.get("range", [0, 1]), response.get("classes", [])
    problems = {
        f"it knows no {', '.join(sorted(strange))}": bool(strange),
        "response.scores or response.labels must say where the answers are": ("scores" in response)
        == ("labels" in response),
        "response.classes must list the classes, or count them": not isinstance(classes, list | int),
        "labels need response.classes": "labels" in response and not classes,
        f"request.encode is one of {', '.join(ENCODINGS)}": request.get("encode", "lists") not in ENCODINGS,
        "request.range is [low, high]": not (
            isinstance(limits, list)
            and len(limits) == 2
            and all(isinstance(v, int | float) for v in limits)
            and limits[0] < limits[1]
        ),
        "request.layout is chw or hwc": request.get("layout", "chw") not in ("chw", "hwc"),
        "request.batch is true or false": not isinstance(request.get("batch", True), bool),
        "request.body is a table": not isinstance(request.get("body", {}), dict),
    }
    found = [what for what, wrong in problems.items() if wrong]
    if found:
        raise UsageError(f"The mapping {name} makes no sense", found="; ".join(found))


def _path(text: Any) -> tuple[Step, ...]:
    if not isinstance(text, str) or _STEP.sub("", text).strip("."):
        raise UsageError("The mapping has a path that can't be read", expected="a.b[0][*]", found=repr(text))
    steps: list[Step] = []
    for name, place in _STEP.findall(text):
        steps.append(name or (None if place == "*" else int(place)))
    return tuple(steps)


def _put(body: Any, path: tuple[Step, ...], value: Any) -> Any:
    """``body`` with ``value`` at ``path``; objects on the way are made. The value itself for no path."""
    if not path:
        return value
    if not isinstance(path[0], str):
        raise UsageError("A request's path holds names only", found=repr(path[0]))
    body = body if isinstance(body, dict) else {}
    body[path[0]] = _put(body.get(path[0], {}), path[1:], value)
    return body


def _dig(value: Any, path: tuple[Step, ...]) -> Any:
    for i, step in enumerate(path):
        if step is None:
            if not isinstance(value, list):
                raise BadAnswer("gave no scores", "a list where the mapping says [*]", type(value).__name__)
            return [_dig(each, path[i + 1 :]) for each in value]
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError) as cause:
            known = ", ".join(map(repr, list(value)[:5])) if isinstance(value, dict) else type(value).__name__
            raise BadAnswer("gave no scores", f"{step!r} as the mapping says", known[:200]) from cause
    return value
