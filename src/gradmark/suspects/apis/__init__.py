"""What prediction services speak: how inputs become a request, and an answer becomes scores.

``json`` (:mod:`.plain`) is what most can be made to speak; ``oip`` is the Open Inference Protocol of
KServe and Triton; ``FILE.toml`` or ``FILE.json`` describes anything else (:mod:`.mapped`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from gradmark.errors import EndpointError, UsageError
from gradmark.suspects.transport import Answer, Transport

Get = Callable[[str], Answer]


class Api(Protocol):
    """How one service is spoken to."""

    @property
    def identity(self) -> str:
        """Goes into the journal's keys; empty for plain JSON."""
        ...

    @property
    def most(self) -> int | None:
        """Inputs in one request; None for any number."""
        ...

    def prepared(self, url: str, get: Get) -> Api:
        """This API once it has looked at what the service says of itself, if it says anything."""
        ...

    def request(self, url: str, x: Tensor) -> tuple[str, bytes, Mapping[str, str]]:
        """Address, body and headers of the request that asks for ``x`` (b, *shape), float32."""
        ...

    def rows(self, answer: Answer, b: int) -> Any:
        """The scores of ``b`` inputs as nested lists or an array; the caller checks their shape.

        Raises BadAnswer where there are none.
        """
        ...


class BadAnswer(Exception):
    """An answer that holds no scores: what is wrong with it, what was expected, what was found."""

    def __init__(self, what: str, expected: str = "", found: str = "") -> None:
        super().__init__(what)
        self.what, self.expected, self.found = what, expected, found


def refusal(cause: BadAnswer, transport: Transport, url: str) -> EndpointError:
    """What a user is told of a bad answer to what ``transport`` sent to ``url``: nothing that is secret."""
    what, expected, found = (transport.public(url, t) for t in (cause.what, cause.expected, cause.found))
    return EndpointError(f"{transport.name} {what}", expected=expected, found=found)


def find_api(name: str) -> Api:
    """The API called ``name``, or that a file describes. UsageError where there is none."""
    from gradmark.suspects.apis.mapped import load_mapping
    from gradmark.suspects.apis.oip import OpenInference
    from gradmark.suspects.apis.plain import PlainJson

    if name.lower().endswith((".toml", ".json")):
        return load_mapping(Path(name))
    if name == "openai":
        raise UsageError(
            "A model that is asked by prompting needs a prompt and its candidate answers",
            expected="a file with a section [completions]",
            fix="--api FILE.toml; docs/endpoints.md has one",
        )
    known: dict[str, Callable[[], Api]] = {"json": PlainJson, "oip": OpenInference}
    if name not in known:
        raise UsageError(
            "No API is called that", expected="json, oip, or a FILE.toml or FILE.json", found=repr(name)
        )
    return known[name]()
