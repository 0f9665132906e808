"""What prediction services speak, asked on real servers; OIP v2 beside its official client."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradmark.errors import EndpointError, UsageError
from gradmark.suspects import HttpSuspect
from gradmark.suspects.apis import find_api
from gradmark.suspects.apis.completions import Completions
from servers import image_app, language_app, oip_app, running

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture(scope="module")
def predict(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small network's probabilities, run by onnxruntime: what stands behind the endpoints."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1)).eval()
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    shapes = ({0: torch.export.Dim("b")},)
    torch.onnx.export(net, (torch.zeros(2, 1, 8, 8),), path, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x.astype(np.float32)})[0]


def images(b: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (b, 1, 8, 8), generator=torch.Generator().manual_seed(seed)) / 255


def mapping(tmp_path: Path, text: str, name: str = "api.toml") -> Any:
    (tmp_path / name).write_text(text)
    return find_api(str(tmp_path / name))


REQUEST = """
[request]
inputs = "instances"
item = "image.b64"
encode = "png"
body = {model = "resnet"}
[response]
"""
CLASSES = f"classes = {json.dumps(NAMES)}\n"


def asked(api: Any, url: str, x: Tensor, **more: Any) -> Tensor:
    suspect = HttpSuspect(url, api=api, **more)
    try:
        return suspect.query(x)
    finally:
        suspect.close()


def test_images_in_and_class_names_out(tmp_path: Path, predict: Any) -> None:
    app, seen = image_app(predict, NAMES)
    x, true = images(9), torch.from_numpy(np.round(predict(images(9).numpy()), 4))
    with running(app) as base:
        url = base + "/v1/classify"
        named = mapping(tmp_path, REQUEST + 'scores = "predictions[*].by_name"\n' + CLASSES)
        torch.testing.assert_close(asked(named, url, x, batch_size=2, concurrency=3), true)
        assert seen["requests"] == 5 and seen["most"] <= 3
        top = mapping(
            tmp_path, REQUEST + 'scores = "predictions[*].top"\nlabel = "name"\nscore = "p"\n' + CLASSES
        )
        got = asked(top, url, x)
        assert ((got > 0).sum(1) == 3).all()
        torch.testing.assert_close(got.max(1).values, true.max(1).values)
        label = mapping(tmp_path, REQUEST + 'labels = "predictions[*].label"\n' + CLASSES)
        assert torch.equal(asked(label, url, x), nn.functional.one_hot(true.argmax(1), 10).float())
        few = mapping(tmp_path, REQUEST + 'scores = "predictions[*].by_name"\nclasses = ["zero", "one"]\n')
        with pytest.raises(EndpointError, match="names classes that the mapping doesn't"):
            asked(few, url, x)
        wrong = mapping(tmp_path, REQUEST + 'scores = "predictions[*].nothing"\n')
        with pytest.raises(EndpointError, match=r"'nothing' as the mapping says.*'by_name', 'top', 'label'"):
            asked(wrong, url, x)


def test_one_input_a_request_in_raw_bytes(tmp_path: Path, predict: Any) -> None:
    app, _ = image_app(predict, NAMES)
    request = '[request]\ninputs = "data.raw"\nbatch = false\nencode = "base64-float32"\n[response]\n'
    with running(app) as base:
        scores = mapping(tmp_path, request + 'scores = "result.scores"\n')
        true = torch.from_numpy(predict(images().numpy()))
        torch.testing.assert_close(asked(scores, base + "/v1/one", images()), true)
        label = mapping(tmp_path, request + 'labels = "result.argmax"\nclasses = 10\n')
        assert torch.equal(asked(label, base + "/v1/one", images()).argmax(1), true.argmax(1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[request", "can't be read"),
        ("[request]\n", r"\[request\] and \[response\]"),
        ("[response]\n", "must say where the answers are"),
        ('[response]\nscores = "a"\nlabels = "b"\n', "must say where"),
        ('[response]\nlabels = "b"\n', "labels need response.classes"),
        ('[response]\nscores = "a"\nfoo = 1\n', "knows no foo"),
        ('[request]\nencode = "jpeg"\n[response]\nscores = "a"\n', "request.encode is one of"),
        ('[request]\nrange = [1, 0]\n[response]\nscores = "a"\n', "range is"),
        ('[response]\nscores = "a[x]"\n', "path that can't be read"),
        ('[completions]\nmodel = "m"\n', r"prompt with \{input\}"),
    ],
)
def test_mappings_without_sense_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        mapping(tmp_path, text)


def test_names_of_apis() -> None:
    with pytest.raises(UsageError, match="No API is called that"):
        find_api("soap")
    with pytest.raises(UsageError, match="candidate answers"):
        find_api("openai")
    with pytest.raises(UsageError, match="can't be read"):
        find_api("nowhere.toml")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("shape", "datatype"),
    [([-1, 1, 8, 8], "FP32"), ([-1, 64], "FP32"), ([4, 1, 8, 8], "FP64"), ([-1, 1, 8, 8], "UINT8")],
)
def test_the_open_inference_protocol(predict: Any, binary: bool, shape: list[int], datatype: str) -> None:
    def flat(x: np.ndarray[Any, Any]) -> Any:
        return predict(x.reshape(-1, 1, 8, 8))

    x = images(6)
    with running(oip_app(flat, shape, binary=binary, datatype=datatype)) as base:
        got = asked(find_api("oip"), base + "/v2/models/net", x, batch_size=5)
    torch.testing.assert_close(got, torch.from_numpy(predict(x.numpy())))


@pytest.mark.parametrize("binary", [True, False])
def test_our_oip_server_is_one_to_its_official_client(predict: Any, binary: bool) -> None:
    client = pytest.importorskip("tritonclient.http")
    x = images(3).numpy()
    with running(oip_app(predict, [-1, 1, 8, 8], binary=binary)) as base:
        triton = client.InferenceServerClient(base.removeprefix("http://"))
        assert triton.get_model_metadata("net")["inputs"][0]["name"] == "image"
        tensor = client.InferInput("image", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x, binary_data=binary)
        wanted = [client.InferRequestedOutput("scores", binary_data=binary)]
        theirs = triton.infer("net", [tensor], outputs=wanted).as_numpy("scores")
        triton.close()
        del triton
        with warnings.catch_warnings():  # its gevent leaves a socket to the garbage collector
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        ours = asked(find_api("oip"), base + "/v2/models/net", images(3))
    np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-6)


def test_oip_models_that_dont_fit_are_refused(predict: Any, record_property: Any) -> None:
    with running(oip_app(predict, [-1, 3, 8, 8])) as base:
        with pytest.raises(EndpointError, match=r"doesn't fit the endpoint's model.*\(3, 8, 8\)") as caught:
            asked(find_api("oip"), base + "/v2/models/net", images())
        record_property("refusal", str(caught.value).replace(base, "http://host"))
        with pytest.raises(EndpointError, match="status 404"):
            asked(find_api("oip"), base + "/v2/models/other", images())
    with (
        running(oip_app(predict, [-1, 64], datatype="BYTES")) as base,
        pytest.raises(EndpointError, match="takes inputs of another kind"),
    ):
        asked(find_api("oip"), base + "/v2/models/net", images())


# --- prompts ----------------------------------------------------------------------------------------------


def next_token(text: str) -> dict[str, float]:
    """A language model of six words, by what the text is."""
    rng = np.random.default_rng(list(text.encode()) or [0])
    values = rng.normal(size=6)
    return dict(zip("abcdef", np.log(np.exp(values) / np.exp(values).sum()).tolist(), strict=True))


def test_candidates_and_the_prompts_own_probabilities(tmp_path: Path) -> None:
    app, seen = language_app(next_token)
    prompts = ["a b c", "b b", "a b c", "c"]
    with running(app) as base:
        url = base + "/v1/completions"
        asking = Completions(url, "words", top=6, batch_size=2, journal=tmp_path / "j")
        got = asking.candidates(prompts, ["a", "f"])
        want = [[next_token(p)["a"], next_token(p)["f"]] for p in prompts]
        torch.testing.assert_close(got, torch.tensor(want))
        assert sorted(map(len, seen)) == [1, 2] and asking.queries == 3
        said = asking.echo(prompts)
        assert [len(row) for row in said] == [2, 1, 2, 0]
        assert float(said[0][1]) == pytest.approx(next_token("a b")["c"], rel=1e-5)
        asking.close()
        again = Completions(url, "words", top=6, journal=tmp_path / "j")
        assert torch.equal(again.candidates(prompts, ["a", "f"]), got) and again.queries == 0
        assert again.reused == 3
        again.candidates(prompts, ["a", "b"])
        assert again.queries == 3, "other candidates, another question"
        again.close()
        hidden = Completions(url, "words", top=2)
        shown = hidden.candidates(["a b c"], list("abcdef"))[0]
        order = sorted(next_token("a b c").values())
        assert shown.max() == pytest.approx(order[-1], rel=1e-5)
        assert (shown.sort().values[:-1] - order[-2]).abs().max() < 1e-5, "what isn't shown ties"
        hidden.close()
        chat = Completions(base + "/v1/chat/completions", "words", top=6)
        torch.testing.assert_close(chat.candidates(prompts, ["a", "f"]), torch.tensor(want))
        with pytest.raises(UsageError, match="Chats don't tell"):
            chat.echo(prompts)
        chat.close()


def test_a_prompted_classifier_is_a_suspect(tmp_path: Path) -> None:
    app, seen = language_app(next_token)
    text = '[completions]\nmodel = "words"\nprompt = "Values: {input}. Class:"\ncandidates = ["a", "b"]\n'
    with running(app) as base:
        x = torch.tensor([[0.5, 1.0], [2.0, -3.25]])
        got = asked(mapping(tmp_path, text), base + "/v1/completions", x)
        assert seen == [["Values: 0.5, 1. Class:"], ["Values: 2, -3.25. Class:"]]
        probabilities = next_token("Values: 0.5, 1. Class:")
        assert float(got[0, 1]) == pytest.approx(probabilities["b"], rel=1e-5)


@pytest.mark.parametrize("body", [b"{}", b'{"choices": []}', b'{"choices": [{"logprobs": null}]}', b"no"])
def test_answers_without_probabilities_are_refused(body: bytes) -> None:
    from gradmark.suspects.apis import BadAnswer
    from gradmark.suspects.apis.completions import candidate_rows, echoed

    for read in (lambda: candidate_rows(body, ["a"], 1), lambda: echoed(body, 1)):
        with pytest.raises(BadAnswer):
            read()


# --- limits -----------------------------------------------------------------------------------------------


def test_the_rate_and_the_budget_are_kept(tmp_path: Path, predict: Any, record_property: Any) -> None:
    app, seen = image_app(predict, NAMES)
    api = mapping(tmp_path, REQUEST + 'scores = "predictions[*].by_name"\n' + CLASSES)
    pauses: list[float] = []
    with running(app) as base:
        suspect = HttpSuspect(
            base + "/v1/classify", api=api, batch_size=2, rate=0.1, budget=8, sleep=pauses.append
        )
        suspect.query(images(6))
        assert [round(p) for p in pauses] == [10, 20], "the clock stands still: one in 10 s"
        with pytest.raises(
            EndpointError, match=r"more than is allowed.*8 inputs at most.*8 asked, 2 more"
        ) as caught:
            suspect.query(images(4, seed=1))
        record_property("refusal", str(caught.value).replace(base, "http://host"))
        assert suspect.queries <= 8 and seen["requests"] == 4
        suspect.close()
    with pytest.raises(UsageError):
        HttpSuspect("http://127.0.0.1:9/", rate=0)


def test_answers_of_another_api_are_not_reused(tmp_path: Path, predict: Any) -> None:
    app, seen = image_app(predict, NAMES)
    with running(app) as base:
        for field, requests in (("by_name", 1), ("top", 2), ("by_name", 2)):
            text = REQUEST + f'scores = "predictions[*].{field}"\nlabel = "name"\nscore = "p"\n' + CLASSES
            asked(mapping(tmp_path, text), base + "/v1/classify", images(), journal=tmp_path / "j")
            assert seen["requests"] == requests
