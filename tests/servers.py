"""Real servers on the loopback interface: FastAPI under uvicorn, in a thread."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
from fastapi import FastAPI, Request, Response

Predict = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address at which ``app`` answers while the block runs."""
    import uvicorn

    config = uvicorn.Config(app, port=0, log_level="error", loop="asyncio", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def image_app(predict: Predict, classes: list[str], decimals: int = 4) -> tuple[Any, dict[str, Any]]:
    """An image classifier in the manner of today's services: base64 PNGs in, class names out."""
    from PIL import Image

    app, seen = FastAPI(), {"now": 0, "most": 0, "requests": 0}

    @app.post("/v1/classify")
    async def classify(request: Request) -> dict[str, Any]:
        body = await request.json()
        seen["requests"] += 1
        seen["now"] += 1
        seen["most"] = max(seen["most"], seen["now"])
        await asyncio.sleep(0.02)
        seen["now"] -= 1
        images = [base64.b64decode(item["image"]["b64"]) for item in body["instances"]]
        x = np.stack([np.asarray(Image.open(io.BytesIO(image)), dtype=np.float32) / 255 for image in images])
        scores = np.round(predict(x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)), decimals)
        names = [dict(zip(classes, row.tolist(), strict=True)) for row in scores]
        best_three = [sorted(row.items(), key=lambda item: -item[1])[:3] for row in names]
        top = [[{"name": name, "p": p} for name, p in row] for row in best_three]
        return {
            "model": body["model"],
            "predictions": [
                {"by_name": row, "top": best, "label": best[0]["name"]}
                for row, best in zip(names, top, strict=True)
            ],
        }

    @app.post("/v1/one")
    async def one(request: Request) -> dict[str, Any]:
        body = await request.json()
        x = np.frombuffer(base64.b64decode(body["data"]["raw"]), "<f4").reshape(1, 1, 8, 8)
        return {"result": {"scores": predict(x)[0].tolist(), "argmax": int(predict(x)[0].argmax())}}

    return app, seen


def oip_app(predict: Predict, shape: list[int], *, binary: bool = True, datatype: str = "FP32") -> Any:
    """The Open Inference Protocol, version 2: metadata, JSON tensors and the binary tensor extension."""

    app = FastAPI()
    types = {"FP32": np.float32, "FP64": np.float64, "UINT8": np.uint8, "FP16": np.float16}

    @app.get("/v2")
    def server() -> dict[str, Any]:
        return {"name": "tests", "version": "1", "extensions": ["binary_tensor_data"] if binary else []}

    @app.get("/v2/models/net")
    def metadata() -> dict[str, Any]:
        tensor = {"name": "image", "datatype": datatype, "shape": shape}
        scores = {"name": "scores", "datatype": "FP32", "shape": [-1, 10]}
        label = {"name": "label", "datatype": "INT64", "shape": [-1]}
        return {"name": "net", "platform": "onnxruntime", "inputs": [tensor], "outputs": [label, scores]}

    @app.post("/v2/models/net/infer")
    async def infer(request: Request) -> Response:
        body, length = await request.body(), request.headers.get("inference-header-content-length")
        head = json.loads(body[: int(length)] if length else body)
        (tensor,) = head["inputs"]
        assert tensor["name"] == "image" and tensor["datatype"] == datatype
        if "data" in tensor:
            x = np.asarray(tensor["data"], dtype=types[datatype])
        else:
            raw = body[int(length or 0) :]
            assert len(raw) == tensor["parameters"]["binary_data_size"]
            x = np.frombuffer(raw, dtype=types[datatype])
        x = x.reshape(tensor["shape"]).astype(np.float32) / (255 if datatype == "UINT8" else 1)
        assert shape[0] in (-1, len(x))
        scores = predict(x).astype(np.float32)
        (wanted,) = head.get("outputs", [{"name": "scores"}])
        assert wanted["name"] == "scores"
        out: dict[str, Any] = {"name": "scores", "datatype": "FP32", "shape": list(scores.shape)}
        if not wanted.get("parameters", {}).get("binary_data"):
            out["data"] = scores.flatten().tolist()
            said = {"model_name": "net", "outputs": [out]}
            return Response(json.dumps(said), media_type="application/json")
        out["parameters"] = {"binary_data_size": scores.nbytes}
        text = json.dumps({"model_name": "net", "outputs": [out]}).encode()
        return Response(
            text + scores.tobytes(),
            media_type="application/octet-stream",
            headers={"Inference-Header-Content-Length": str(len(text))},
        )

    return app


def language_app(next_token: Callable[[str], dict[str, float]]) -> tuple[Any, list[Any]]:
    """OpenAI-compatible completions of a model of single words, with log-probabilities and echo."""

    app, seen = FastAPI(), []

    def likeliest(text: str, top: int) -> dict[str, float]:
        return dict(sorted(next_token(text).items(), key=lambda item: -item[1])[:top])

    @app.post("/v1/completions")
    async def completions(request: Request) -> dict[str, Any]:
        body = await request.json()
        seen.append(body["prompt"])
        choices = []
        for i, prompt in enumerate(body["prompt"]):
            words = prompt.split(" ")
            if body["echo"]:
                assert body["max_tokens"] == 0
                said = [None] + [
                    next_token(" ".join(words[:k])).get(words[k], -9.0) for k in range(1, len(words))
                ]
                probs: dict[str, Any] = {"tokens": words, "token_logprobs": said}
            else:
                probs = {"top_logprobs": [likeliest(prompt, body["logprobs"])]}
            choices.append({"index": i, "text": "", "logprobs": probs})
        return {"choices": choices[::-1]}  # in no order in particular

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> dict[str, Any]:
        body = await request.json()
        seen.append(body["messages"][0]["content"])
        top = likeliest(body["messages"][0]["content"], body["top_logprobs"])
        rows = [{"token": token, "logprob": value} for token, value in top.items()]
        return {"choices": [{"index": 0, "logprobs": {"content": [{"top_logprobs": rows}]}}]}

    return app, seen
