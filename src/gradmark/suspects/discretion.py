"""What others wrote, without what they were sent in confidence: a server may quote a header."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from urllib.parse import parse_qsl, unquote, urlsplit

_PIECE = 8  # characters of a secret that tell of it
_SECRET = 4  # characters; anything shorter is found everywhere
_OPEN = {"application/json", "application/octet-stream", "Bearer", "Basic", "Token"}


def discreet(text: str, url: str, headers: Mapping[str, str]) -> str:
    """``text`` without headers' values, and without user, password and query of the address."""
    for secret in sorted(_secrets(url, headers), key=len, reverse=True):
        text = _without(text.replace(secret, "***"), secret)
    return text


def _secrets(url: str, headers: Mapping[str, str]) -> set[str]:
    """What an answer mustn't bring back into an error: headers' values, user, password and query."""
    parts = urlsplit(url)
    said = [*headers.values(), parts.username or "", parts.password or "", parts.query]
    said += [value for _, value in parse_qsl(parts.query)]
    if parts.username or parts.password:
        said.append(base64.b64encode(f"{parts.username or ''}:{parts.password or ''}".encode()).decode())
    pieces = {piece for value in said for piece in (value.strip(), unquote(value.strip()), *value.split())}
    pieces = {piece for piece in pieces if len(piece) >= _SECRET and piece not in _OPEN}
    escaped = {json.dumps(piece)[1:-1] for piece in pieces}  # as an answer in JSON would have them
    return pieces | escaped | {piece.replace("/", r"\/") for piece in escaped}


def _without(text: str, secret: str) -> str:
    """``text`` without pieces of a long secret, which who wrote it may have cut."""
    at = 0
    while len(secret) > _PIECE and at + _PIECE <= len(text):
        n = _PIECE
        if text[at : at + n] not in secret:
            at += 1
            continue
        while at + n < len(text) and text[at : at + n + 1] in secret:
            n += 1
        text = f"{text[:at]}***{text[at + n :]}"
        at += 3
    return text
