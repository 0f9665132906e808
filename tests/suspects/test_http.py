"""Endpoints that fail, lie or hang, on real loopback servers."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradmark.endpoint import serve
from gradmark.errors import DataError, EndpointError, OutputPathError, UsageError
from gradmark.suspects import HttpSuspect, open_suspect, public_name

httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("tenacity")

Answer = tuple[int, dict[str, str], bytes] | None
"""Status, headers, body; None closes the connection without a word."""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


class Server:
    """Answers request number i with ``script[i]``, and like a model once the script is over."""

    def __init__(self, script: list[Answer | Callable[[], Answer]]) -> None:
        self.script, self.lock = script, threading.Lock()
        self.headers: list[dict[str, str]] = []
        self.requests: list[list[Any]] = []
        self.release = threading.Event()

    @property
    def inputs(self) -> list[list[float]]:
        return [row for request in self.requests for row in request]

    def answer(self, inputs: list[Any], headers: dict[str, str]) -> Answer:
        with self.lock:
            number = len(self.requests)
            self.requests.append(inputs)
            self.headers.append({key.lower(): value for key, value in headers.items()})
        if number < len(self.script):
            step = self.script[number]
            return step() if callable(step) else step
        return ok(model(torch.tensor(inputs)).tolist())


def model(x: Tensor) -> Tensor:
    return torch.stack([x.flatten(1).sum(1), x.flatten(1)[:, 0]], dim=1)


def ok(content: Any) -> Answer:
    return 200, {}, json.dumps(content).encode()


def status(code: int, **headers: str) -> Answer:
    return code, {k.replace("_", "-"): v for k, v in headers.items()}, b"sorry, " + b"x" * 500


@contextmanager
def running(*script: Any) -> Iterator[tuple[str, Server]]:
    state = Server(list(script))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = state.answer(body.get("inputs", body.get("x")), dict(self.headers))
            if answer is None:
                self.close_connection = True
                return
            code, headers, content = answer
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/predict", state
    finally:
        state.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def asking(url: str, **options: Any) -> Iterator[tuple[HttpSuspect, list[float]]]:
    pauses: list[float] = []
    suspect = HttpSuspect(url, sleep=pauses.append, **options)
    try:
        yield suspect, pauses
    finally:
        suspect.close()


def inputs(b: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(b, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("concurrency", [1, 4])
def test_float32_survives_the_way_in_any_batching(concurrency: int) -> None:
    x = torch.cat([inputs(9), torch.tensor([1e-45, 3.4e38, -0.1, 1 / 3, 0.0, -0.0]).view(1, 2, 3)])
    with running() as (url, server), asking(url, batch_size=3, concurrency=concurrency) as (suspect, _):
        torch.testing.assert_close(suspect.query(x), model(x))
        got = {tuple(torch.tensor(row).flatten().tolist()) for row in server.inputs}
        assert got == {tuple(row.flatten().tolist()) for row in x}
        assert suspect.queries == 10 and suspect.retries == 0 and len(server.requests) == 4


FIELDS = ["outputs", "probabilities", "probs", "logits", "scores", "predictions", "predict", None]


@pytest.mark.parametrize("field", FIELDS)
def test_every_documented_answer_is_understood(field: str | None) -> None:
    rows = [[0.25, 0.75]] * 5
    with (
        running(ok({"id": 1, field: rows} if field else rows)) as (url, _),
        asking(url) as (suspect, _pauses),
    ):
        assert suspect.query(inputs()).tolist() == rows


def test_headers_and_the_input_field_are_sent() -> None:
    with (
        running() as (url, server),
        asking(url, input_field="x", headers={"Authorization": "s3cret"}) as (s, _),
    ):
        s.query(inputs())
        assert server.headers[0]["authorization"] == "s3cret"
        assert "s3cret" not in repr(s)


def test_a_server_that_quotes_what_it_was_sent_brings_no_secret_into_an_error() -> None:
    basic = base64.b64encode(b"ann:s3cret").decode()
    said = f"Bearer sk-SECRET for ann:s3cret ({basic}), api_key=k3y%2Fk3y or k3y/k3y".encode()
    for code in (401, 500):
        with running(*[(code, {}, said)] * 6) as (url, _):
            address = url.replace("http://", "http://ann:s3cret@") + "?api_key=k3y%2Fk3y"
            with asking(address, headers={"Authorization": "Bearer sk-SECRET"}) as (suspect, _pauses):
                with pytest.raises(EndpointError) as caught:
                    suspect.query(inputs())
                told = str(caught.value) + repr(suspect)
                assert not any(s in told for s in ("sk-SECRET", "s3cret", basic, "k3y%2Fk3y", "k3y/k3y")), (
                    told
                )


def test_long_escaped_and_successful_echoes_show_no_secret_either() -> None:
    long = "sk-" + "x" * 6000
    slashed = 'a/b"c/d'
    bodies = [
        (401, json.dumps({"error": f"invalid {long}"}).encode(), long),
        (401, json.dumps({"error": slashed}).replace("/", r"\/").encode(), slashed),
        (200, json.dumps({f"Authorization {slashed}": 1}).encode(), slashed),
        (200, json.dumps({long: 1}).encode(), long),
    ]
    for code, body, secret in bodies:
        with running((code, {}, body)) as (url, _), asking(url, headers={"x-key": secret}) as (suspect, _p):
            with pytest.raises(EndpointError) as caught:
                suspect.query(inputs())
            told = str(caught.value)
            assert "***" in told
            assert "xxxxxxxx" not in told
            assert "c/d" not in told.replace("\\", "")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "raw deflate", "br"])
def test_packed_answers_are_unpacked_where_that_was_asked_for(encoding: str) -> None:
    body = json.dumps({"outputs": model(inputs()).tolist()}).encode()
    raw = zlib.compressobj(wbits=-15)
    packed = {
        "gzip": gzip.compress(body), "deflate": zlib.compress(body),
        "raw deflate": raw.compress(body) + raw.flush(), "br": b"????",
    }[encoding]  # fmt: skip
    answer = 200, {"Content-Encoding": encoding.removeprefix("raw ")}, packed
    with running(answer) as (url, _), asking(url) as (suspect, _pauses):
        if encoding == "br":
            with pytest.raises(EndpointError, match="gzip or deflate"):
                suspect.query(inputs())
        else:
            torch.testing.assert_close(suspect.query(inputs()), model(inputs()))


def test_a_small_answer_that_unpacks_without_end_is_given_up() -> None:
    bomb = gzip.compress(bytes(80 * 2**20))
    with (
        running((200, {"Content-Encoding": "gzip"}, bomb)) as (url, _),
        asking(url) as (suspect, _pauses),
        pytest.raises(EndpointError, match="without end"),
    ):
        suspect.query(inputs())


def test_an_address_that_cannot_be_read_shows_no_password() -> None:
    for url in ("http://user:s3cret/x@host/p", "http://user:s3c#ret@host/p"):
        with pytest.raises(UsageError, match="address can't be read") as caught:
            HttpSuspect(url)
        assert "s3c" not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("what", ["headers", "body", "empty blocks"])
def test_an_answer_that_drips_is_given_up(what: str) -> None:
    """Each byte comes in time, and the whole never."""

    class Drip(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            drop = b" "
            if what == "headers":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nx-long: ")
                drop = b"x"
            else:
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                if what == "empty blocks":
                    self.send_header("Content-Encoding", "deflate")
                    drop = b"\x00\x00\x00\xff\xff"
                self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(500):
                    self.wfile.write(drop)
                    self.wfile.flush()
                    time.sleep(0.02)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/predict"
        with (
            asking(url, timeout=0.05, attempts=2) as (suspect, _),
            pytest.raises(EndpointError, match=r"takes longer than 0.5 s|timed out"),
        ):
            suspect.query(inputs())
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("failure", [status(500), status(502), status(503), status(504), status(429), None])
def test_passing_failures_are_retried(failure: Answer) -> None:
    with running(failure, failure) as (url, server), asking(url) as (suspect, pauses):
        torch.testing.assert_close(suspect.query(inputs()), model(inputs()))
        assert len(server.requests) == 3 and len(pauses) == suspect.retries == 2 and suspect.queries == 5
        assert all(0 <= pause <= 30 for pause in pauses)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("7", 7, 7),
        ("100000", 60, 60),
        (format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True), 60, 60),
        (format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True), 0, 0),
        ("soon", 0, 30),
        ("Fri, 99999999999999999999 Nov 2026 00:00:00 GMT", 0, 30),
    ],
    ids=[
        "seconds",
        "too many",
        "a day ahead",
        "a day ago",
        "nonsense",
        "no such day",
    ],  # the same in every process
)
def test_retry_after_is_obeyed_up_to_a_minute(value: str, low: float, high: float) -> None:
    with running(status(429, Retry_After=value)) as (url, _), asking(url) as (suspect, pauses):
        suspect.query(inputs())
        assert len(pauses) == 1 and low <= pauses[0] <= high


def test_a_timeout_is_retried() -> None:
    with running() as (url, server), asking(url, timeout=0.3) as (suspect, pauses):

        def hang() -> Answer:
            server.release.wait()
            return None

        server.script.append(hang)
        torch.testing.assert_close(suspect.query(inputs()), model(inputs()))
        assert len(pauses) == 1


def test_it_gives_up_with_the_last_reason() -> None:
    with running(*[status(503)] * 9) as (url, server), asking(url, attempts=3) as (suspect, pauses):
        with pytest.raises(EndpointError, match=r"kept failing in 3 attempts.*status 503: sorry") as caught:
            suspect.query(inputs())
        assert len(server.requests) == 3 and len(pauses) == 2 and suspect.queries == 0
        assert "x" * 201 not in str(caught.value)


def test_an_address_where_nobody_listens() -> None:
    with running() as (url, _):
        pass
    with asking(url, attempts=2) as (suspect, pauses):
        with pytest.raises(EndpointError, match="ConnectError"):
            suspect.query(inputs())
        assert len(pauses) == 1


@pytest.mark.parametrize("code", [301, 400, 401, 403, 404, 413, 422, 501])
def test_other_statuses_fail_at_once(code: int, record_property: Any) -> None:
    with running(status(code)) as (url, server), asking(url) as (suspect, pauses):
        with pytest.raises(EndpointError, match=rf"status {code}: sorry") as caught:
            suspect.query(inputs())
        record_property("refusal", str(caught.value).replace(suspect.name, "http://host/"))
        assert len(server.requests) == 1 and not pauses


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, {}, b"<html>hello"), r"gave no JSON.*<html>hello"),
        ((200, {}, b""), "gave no JSON"),
        ((200, {}, b"[" * 10**6), "gave no JSON"),
        (ok({"classes": [1]}), "'classes'"),
        (ok("cat"), "a list of rows"),
        (ok([0, 1, 2, 0, 1]), r"wrong shape.*\(5,\)"),
        (ok([[0.5, 0.5]] * 4), r"Expected scores of shape \(5, classes\).*\(4, 2\)"),
        (ok([[0.5, 0.5]] * 4 + [[1.0]]), "no class scores"),
        (ok([["a", "b"]] * 5), "no class scores"),
        (ok([[float("nan"), 0.5]] * 5), "aren't finite"),
        (ok([[1e300, 0.5]] * 5), "aren't finite"),
        (ok([[None, 0.5]] * 5), "no class scores"),
        ((200, {"Content-Encoding": "gzip"}, b"not gzip"), "broken answer"),
    ],
)
def test_nonsense_is_refused_and_not_retried(answer: Answer, words: str) -> None:
    with running(answer) as (url, server), asking(url) as (suspect, _):
        with pytest.raises(EndpointError, match=words):
            suspect.query(inputs())
        assert len(server.requests) == 1


def test_a_changing_class_count_is_refused() -> None:
    with (
        running(ok([[1, 2, 3]])) as (url, _),
        asking(url, batch_size=1) as (suspect, _pauses),
        pytest.raises(EndpointError, match="changed its number of classes"),
    ):
        suspect.query(inputs(2))


def test_an_interrupted_run_asks_nothing_twice(tmp_path: Path) -> None:
    journal, x = tmp_path / "journal.jsonl", inputs(10)
    with running() as (url, server):
        server.script += [ok(model(x[:4]).tolist()), status(400)]
        with asking(url, batch_size=4, journal=journal) as (first, _):
            with pytest.raises(EndpointError):
                first.query(x)
            assert (first.queries, first.reused) == (4, 0)
        assert journal.stat().st_mode & 0o777 == 0o600
        with asking(url, batch_size=4, journal=journal) as (second, _):
            assert torch.equal(second.query(x), model(x))
            assert (second.queries, second.reused) == (6, 4)
            assert torch.equal(second.query(x.flip(0)), model(x).flip(0))
            assert second.queries == 6
        answered = server.requests[0] + [row for request in server.requests[2:] for row in request]
        assert len(answered) == 10 and len({json.dumps(row) for row in answered}) == 10


def test_a_torn_last_line_is_asked_again(tmp_path: Path) -> None:
    journal, x = tmp_path / "journal.jsonl", inputs(6)
    with running() as (url, _server):
        with asking(url, journal=journal) as (suspect, _):
            suspect.query(x)
        whole = journal.read_bytes()
        for cut in (1, 20, 70):
            journal.write_bytes(whole[:-cut])
            with asking(url, journal=journal) as (suspect, _):
                assert torch.equal(suspect.query(x), model(x))
                assert (suspect.queries, suspect.reused) == (1, 5)
            assert journal.read_bytes() == whole


@pytest.mark.parametrize("line", [b"{}", b"[1]", b"nonsense", b'{"input": "a", "scores": ["x"]}', b"\xff"])
def test_a_damaged_journal_is_refused(tmp_path: Path, line: bytes) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(b'{"input": "a", "scores": [1.0]}\n' + line + b"\n")
    with pytest.raises(DataError, match="damaged in line 2"):
        HttpSuspect("http://127.0.0.1:9/", journal=journal)
    with pytest.raises(OutputPathError):
        HttpSuspect("http://127.0.0.1:9/", journal=tmp_path / "no" / "journal")


def test_no_other_file_is_taken_for_a_torn_journal(tmp_path: Path) -> None:
    """A mark file is one line without a line feed, as a torn journal is."""
    other = tmp_path / "mark.json"
    for content in (b'{"carriers":200,"format":"gradmark-mark/1"}', b"one line of notes", b"["):
        other.write_bytes(content)
        with pytest.raises(DataError, match="damaged in line 1"):
            HttpSuspect("http://127.0.0.1:9/", journal=other)
        assert other.read_bytes() == content
    torn = b'{"input": "ab'
    other.write_bytes(torn)
    HttpSuspect("http://127.0.0.1:9/", journal=other)
    assert other.read_bytes() == b""


def test_answers_of_another_endpoint_or_shape_are_not_reused(tmp_path: Path) -> None:
    journal, x = tmp_path / "journal.jsonl", torch.zeros(2, 6)
    with running() as (url, _):
        for address, shape, asked in [
            (url, (2, 6), 1),
            (url, (2, 2, 3), 1),
            (url + "2", (2, 6), 1),
            (url, (2, 6), 0),
        ]:
            with asking(address, journal=journal) as (suspect, _pauses):
                suspect.query(x.view(shape))
                assert suspect.queries == asked  # the two rows are the same input


def test_a_journal_works_under_concurrency(tmp_path: Path) -> None:
    journal, x = tmp_path / "journal.jsonl", inputs(40)
    with running(status(500), status(500)) as (url, server):
        with asking(url, batch_size=2, concurrency=4, journal=journal) as (suspect, _):
            assert torch.equal(suspect.query(x), model(x))
        with asking(url, journal=journal) as (suspect, _):
            assert torch.equal(suspect.query(x), model(x))
            assert suspect.queries == 0
        assert len(server.requests) == 22
    assert len(journal.read_text().splitlines()) == 40


def test_the_shown_address_holds_no_secret() -> None:
    suspect = HttpSuspect("http://me:pass@example.org:81/a?token=abc#f")
    assert suspect.name == "http://example.org:81/a"
    assert suspect.digest.startswith("sha256:")
    assert public_name("http://me:pass@example.org:81/a?token=abc#f") == suspect.name
    assert public_name("models/a.pt2") == "models/a.pt2"
    for bad in ("ftp://a/", "http://", "http://a:b/", "nothing"):
        with pytest.raises(UsageError):
            HttpSuspect(bad)
    with pytest.raises(UsageError):
        HttpSuspect("http://a/", batch_size=0)


def test_the_demo_endpoint_answers_and_refuses(tmp_path: Path) -> None:
    def predict(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return model(torch.from_numpy(x)).numpy() / (0 if x.shape[1:] == (1, 1) else 1)

    with serve(predict) as url, httpx2.Client() as client:
        suspect = open_suspect(url, journal=tmp_path / "journal")
        assert isinstance(suspect, HttpSuspect)
        assert torch.equal(suspect.query(inputs()), model(inputs()))
        suspect.close()
        for body in (
            b"",
            b"{",
            b"[]",
            b'{"inputs": 3}',
            b'{"inputs": [["a"]]}',
            b'{"inputs": [[1], [1, 2]]}',
        ):
            assert client.post(url, content=body).status_code == 400
        assert client.get(url).status_code == 501


def test_the_demo_endpoint_hides_its_failures() -> None:
    def predict(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        raise RuntimeError("a secret")

    with serve(predict) as url, asking(url, attempts=2) as (suspect, _):
        with pytest.raises(EndpointError, match="status 500") as caught:
            suspect.query(inputs())
        assert "secret" not in str(caught.value)
