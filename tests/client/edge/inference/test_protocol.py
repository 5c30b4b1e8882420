"""The Open Inference Protocol without a socket: answers, and errors that say what is wrong."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunecast.client.edge import EdgeModel
from prunecast.client.edge.inference import EndpointLimits, InferenceProtocol
from prunecast.client.edge.inference.messages import (
    InferRequest,
    encode_response,
    least_output_bytes,
)
from prunecast.client.edge.inference.protocol import EndpointReply
from prunecast.client.edge.slots.slot import LoadedRelease
from prunecast.compression.release.runtime import Signature, open_session
from support import foreign
from support.classifier import classifier_inputs
from support.served import DTYPES, classifier_outputs

X = classifier_inputs()
INFER = "/v2/models/toy/infer"


@pytest.fixture
def protocol(toys: list[LoadedRelease]) -> InferenceProtocol:
    return InferenceProtocol(EdgeModel(toys[0]), "toy", EndpointLimits(json_bytes=4096))


def get(protocol: InferenceProtocol, path: str) -> tuple[int, Any]:
    answer = protocol.answer("GET", path, memoryview(b""))
    return answer.status, json.loads(answer.body)


def post(
    protocol: InferenceProtocol, document: object, binary: bytes = b"", path: str = INFER
) -> EndpointReply:
    text = json.dumps(document).encode()
    stated = str(len(text)) if binary else None
    return protocol.answer("POST", path, memoryview(text + binary), stated)


def tensor(**changes: object) -> dict[str, object]:
    given = {"name": "input", "shape": [4, 12], "datatype": "FP32", "data": X.ravel().tolist()}
    return {k: v for k, v in {**given, **changes}.items() if v is not ...}


def test_metadata_and_health(protocol: InferenceProtocol) -> None:
    status, server = get(protocol, "/v2")
    assert (status, server["name"], server["extensions"]) == (
        200,
        "prunecast",
        ["binary_tensor_data"],
    )
    assert get(protocol, "/v2/health/live") == (200, {"live": True})
    assert get(protocol, "/v2/health/ready") == (200, {"ready": True, "live": True})
    assert get(protocol, "/v2/models/toy/ready") == (200, {"name": "toy", "ready": True})
    assert get(protocol, "/v2/models/toy/versions/1/ready")[0] == 200
    described = {
        "name": "toy",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 12]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 5]}],
    }
    assert get(protocol, "/v2/models/toy") == (200, described)
    assert get(protocol, "/v2/models/toy/versions/1") == (200, described)
    assert get(protocol, "/v2/models/t%6Fy/")[0] == 200


@pytest.mark.parametrize("data", [X.ravel().tolist(), X.tolist()], ids=["flat", "nested"])
def test_an_answer_in_json(protocol: InferenceProtocol, data: list[object]) -> None:
    answer = post(protocol, {"id": "42", "inputs": [tensor(data=data)]})
    assert answer.status == 200
    assert answer.headers == {"Content-Type": "application/json"}
    document = json.loads(answer.body)
    assert (document["model_name"], document["model_version"], document["id"]) == ("toy", "1", "42")
    (output,) = document["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("output", "FP32", [4, 5])
    found = np.array(output["data"], np.float32).reshape(4, 5)
    assert np.abs(found - classifier_outputs(1, X)).max() < 1e-5


def bytes_of(texts: list[str]) -> bytes:
    coded = [text.encode() for text in texts]
    return b"".join(len(text).to_bytes(4, "little") + text for text in coded)


@pytest.mark.parametrize("binary", [False, True])
def test_texts_go_in_and_out(echo: LoadedRelease, tmp_path: Path, binary: bool) -> None:
    session = open_session(foreign.save(foreign.texts(), tmp_path / "m.onnx"))
    protocol = InferenceProtocol(EdgeModel(replace(echo, session=session)), "echo")
    words, path = ["2", "straße", "unknown"], "/v2/models/echo/infer"
    sent = bytes_of(words)
    one = {"name": "word", "shape": [3], "datatype": "BYTES"}
    one |= {"parameters": {"binary_data_size": len(sent)}} if binary else {"data": words}
    asked = [{"name": "name", "parameters": {"binary_data": binary}}, {"name": "code"}]
    answer = post(protocol, {"inputs": [one], "outputs": asked}, sent if binary else b"", path)
    assert answer.status == 200, answer.body
    at = int(answer.headers.get("Inference-Header-Content-Length", len(answer.body)))
    name, code = json.loads(answer.body[:at])["outputs"]
    assert code["data"] == [20, 30, -1]
    assert (name["datatype"], name["shape"]) == ("BYTES", [3])
    wanted = ["", "road", "none of them"]
    assert name.get("data", wanted) == wanted
    assert bytes(answer.body[at:]) == (bytes_of(wanted) if binary else b"")
    if binary:
        assert name["parameters"] == {"binary_data_size": len(bytes_of(wanted))}


@pytest.mark.parametrize(
    ("binary", "told"),
    [
        (bytes_of(["a", "b"]), "2 texts; its shape needs 3"),
        (bytes_of(["a", "b", "c"])[:-1], "goes beyond"),
        (bytes_of(["a", "b", "c"]) + b"\1", "goes beyond"),
        (b"\xff\xff\xff\xff" + bytes(8), "goes beyond"),
        (b"\1\0\0\0\xff" + bytes(8), "not UTF-8"),
    ],
)
def test_texts_that_are_none_are_refused(
    echo: LoadedRelease, tmp_path: Path, binary: bytes, told: str
) -> None:
    session = open_session(foreign.save(foreign.texts(), tmp_path / "m.onnx"))
    protocol = InferenceProtocol(EdgeModel(replace(echo, session=session)), "echo")
    one = {"name": "word", "shape": [3], "datatype": "BYTES"}
    path = "/v2/models/echo/infer"
    given = {**one, "parameters": {"binary_data_size": len(binary)}}
    answer = post(protocol, {"inputs": [given]}, binary, path)
    assert answer.status == 400
    assert told in json.loads(answer.body)["error"]
    answer = post(protocol, {"inputs": [{**one, "data": ["a", 1, "b"]}]}, path=path)
    assert (answer.status, "type int" in json.loads(answer.body)["error"]) == (400, True)


def test_binary_tensors_of_every_datatype_come_back_as_they_went(echo: LoadedRelease) -> None:
    protocol = InferenceProtocol(EdgeModel(echo), "echo")
    rng = np.random.default_rng(0)
    arrays = {name: (rng.random((2, 3)) * 200).astype(dt) for name, dt in DTYPES.items()}
    names = {"b": "BOOL", "u": "UINT8", "i": "INT64", "h": "FP16", "f": "FP32", "d": "FP64"}
    for binary in (True, False):
        inputs = [
            {
                "name": name,
                "shape": [2, 3],
                "datatype": names[name],
                **(
                    {"parameters": {"binary_data_size": array.nbytes}}
                    if binary
                    else {"data": array.tolist()}
                ),
            }
            for name, array in arrays.items()
        ]
        asked = [
            {"name": "u_out"},
            *({"name": f"{n}_out", "parameters": {"binary_data": True}} for n in "hbifd"),
        ]
        answer = post(
            protocol,
            {"inputs": inputs, "outputs": asked},
            b"".join(a.tobytes() for a in arrays.values()) if binary else b"",
            "/v2/models/echo/infer",
        )
        assert answer.status == 200, answer.body
        at = int(answer.headers["Inference-Header-Content-Length"])
        document = json.loads(answer.body[:at])
        assert [o["name"][0] for o in document["outputs"]] == list("uhbifd")
        assert document["outputs"][0]["data"] == arrays["u"].ravel().tolist()
        for output in document["outputs"][1:]:
            want = arrays[output["name"][0]].tobytes()
            assert output["datatype"] == names[output["name"][0]]
            assert answer.body[at : at + output["parameters"]["binary_data_size"]] == want
            at += len(want)
        assert at == len(answer.body)


def test_what_json_cannot_say_must_be_asked_for_as_binary(echo: LoadedRelease) -> None:
    protocol = InferenceProtocol(EdgeModel(echo), "echo")
    inputs = [
        {"name": n, "shape": [1, 3], "datatype": d, "data": v}
        for n, d, v in [
            ("b", "BOOL", [True, False, True]),
            ("u", "UINT8", [0, 1, 255]),
            ("i", "INT64", [-(2**63), 0, 2**63 - 1]),
            ("h", "FP16", [0, 1, 2]),
            ("f", "FP32", [0, 1, 2]),
            ("d", "FP64", [0.1, 1, 2]),
        ]
    ]
    path = "/v2/models/echo/infer"
    refused = post(protocol, {"inputs": inputs, "outputs": [{"name": "log"}]}, path=path)
    assert refused.status == 400
    assert b"not finite" in refused.body
    everything = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    answer = post(protocol, everything, path=path)
    at = int(answer.headers["Inference-Header-Content-Length"])
    assert np.isneginf(np.frombuffer(answer.body[-12:], "<f4")[0])
    assert len(json.loads(answer.body[:at])["outputs"]) == 7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"datatype": "FP64"}, "must be float32"),
        ({"datatype": "BF16"}, "has the datatype"),
        ({"datatype": ...}, "has the datatype None"),
        ({"datatype": []}, "has the datatype"),
        ({"shape": [4, 13]}, "needs 52"),
        ({"shape": [48]}, r"must be float32['batch', 12]"),
        ({"shape": [-4, -12]}, "has the shape"),
        ({"shape": [4.0, 12]}, "has the shape"),
        ({"shape": [True, 48]}, "has the shape"),
        ({"shape": [1 << 20, 1 << 20]}, "needs 1099511627776"),
        ({"shape": [1 << 31, 1 << 31]}, "has the shape"),
        ({"shape": [2**30] * 16}, "has the shape"),
        ({"shape": [0, 2**31 - 1, 2**31 - 1], "data": []}, "has the shape"),
        ({"shape": [1] * 17}, "has the shape"),
        ({"shape": "4,12"}, "has the shape"),
        ({"shape": ...}, "has the shape None"),
        ({"data": ...}, "data must be a list"),
        ({"data": "AAAA"}, "data must be a list"),
        ({"data": [0.5] * 47}, "has 47 values"),
        ({"data": [0.5] * 47 + ["0.5"]}, "values of type str"),
        ({"data": [0.5] * 47 + [None]}, "values of type NoneType"),
        ({"data": [0.5] * 47 + [True]}, "values of type bool"),
        ({"data": [0.5] * 47 + [1e39]}, "does not fit float32"),
        ({"data": [0.5] * 47 + [10**400]}, "does not fit float32"),
        ({"data": [[0.5] * 24, [0.5] * 24]}, "nesting"),
        ({"data": [[0.5] * 12] * 3 + [[0.5] * 11, 0.5]}, "nesting"),
        ({"data": [[[0.5]] * 12] * 4}, "values of type list"),
        ({"name": 3}, "needs a name"),
        ({"name": "other"}, "takes the inputs ['input'], not ['other']"),
        ({"parameters": {"binary_data_size": 192}}, "beyond the"),
        ({"parameters": {"binary_data_size": -1}}, "beyond the"),
        ({"parameters": {"binary_data_size": "192"}}, "beyond the"),
        ({"parameters": []}, "must be a JSON object"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(
    protocol: InferenceProtocol, change: dict[str, object], says: str
) -> None:
    answer = post(protocol, {"inputs": [tensor(**change)]})
    error = json.loads(answer.body)
    assert (answer.status, list(error)) == (400, ["error"])
    assert says in error["error"]
    assert len(error["error"]) <= 500


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 4000,
        b'{"inputs":' * 300,
        b"1" * 4000,
        b"{}",
        b'{"inputs":{}}',
        b'{"inputs":[3]}',
        b'{"inputs":[],"id":7}',
        b'{"inputs":[],"parameters":3}',
        b'{"inputs":[],"outputs":[{"name":"x","parameters":{"classification":3}}]}',
    ],
)
def test_no_json_brings_it_down(protocol: InferenceProtocol, body: bytes) -> None:
    answer = protocol.answer("POST", INFER, memoryview(body))
    assert answer.status == 400
    assert json.loads(answer.body)["error"]


def test_random_damage_gives_answers_or_errors_and_nothing_else(
    protocol: InferenceProtocol,
) -> None:
    rng = np.random.default_rng(5)
    document = {"inputs": [tensor(data=...)], "outputs": [{"name": "output"}]}
    document["inputs"][0]["parameters"] = {"binary_data_size": 192}  # type: ignore[index]
    text = json.dumps(document).encode()
    whole = text + X.tobytes()
    seen = set()
    for _ in range(400):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(text), int(rng.integers(1, 4))):
            damaged[at] = int(rng.integers(32, 127))
        answer = protocol.answer("POST", INFER, memoryview(damaged), str(len(text)))
        seen.add(answer.status)
        json.loads(
            answer.body[: int(answer.headers.get("Inference-Header-Content-Length", -1))]
            if answer.status == 200 and "Inference-Header-Content-Length" in answer.headers
            else answer.body
        )
    assert seen <= {200, 400}
    assert 400 in seen


@pytest.mark.parametrize(
    ("stated", "status"), [("x", 400), ("-1", 400), ("9999999", 400), ("1" * 40, 400), ("3", 400)]
)
def test_a_wrong_length_of_the_json_is_refused(
    protocol: InferenceProtocol, stated: str, status: int
) -> None:
    body = json.dumps({"inputs": [tensor()]}).encode()
    assert protocol.answer("POST", INFER, memoryview(body), stated).status == status


def test_bytes_that_belong_to_nobody_and_duplicates_are_refused(
    protocol: InferenceProtocol,
) -> None:
    assert b"belong to no input" in post(protocol, {"inputs": [tensor()]}, b"12").body
    assert b"given twice" in post(protocol, {"inputs": [tensor(), tensor()]}).body
    asked = {"inputs": [tensor()], "outputs": [{"name": "nothing"}]}
    assert b"there is no output 'nothing'" in post(protocol, asked).body
    large = post(protocol, {"inputs": [tensor(data=[0.123456789] * 900)]})
    assert (large.status, b"binary" in large.body) == (413, True)


def test_a_bool_is_nought_or_one(echo: LoadedRelease) -> None:
    protocol = InferenceProtocol(EdgeModel(echo), "echo")
    given = {
        "name": "b",
        "shape": [1, 3],
        "datatype": "BOOL",
        "parameters": {"binary_data_size": 3},
    }
    answer = post(protocol, {"inputs": [given]}, b"\0\1\2", "/v2/models/echo/infer")
    assert b"a byte of 0 or 1" in answer.body


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/models/toy", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/..%2f..%2fetc", 404),
        ("GET", "/v2/models/toy/versions/2", 404),
        ("GET", "/v2/models/toy/versions/one", 404),
        ("GET", "/v2/models/toy/versions/" + "9" * 50, 404),
        ("GET", "/v2/models/toy/versions/2/ready", 404),
        ("GET", "/v2/models/toy/infer", 405),
        ("POST", "/v2/models/toy", 405),
        ("POST", "/v2", 405),
        ("POST", "/v2/models/other/infer", 404),
    ],
)
def test_what_is_not_served(
    protocol: InferenceProtocol, method: str, path: str, status: int
) -> None:
    assert protocol.answer(method, path, memoryview(b"")).status == status


def test_a_version_is_served_only_while_it_is_active(toys: list[LoadedRelease]) -> None:
    model = EdgeModel()
    protocol = InferenceProtocol(model, "toy")
    request = {"inputs": [tensor()]}
    assert post(protocol, request).status == 503
    assert get(protocol, "/v2/health/ready")[0] == 503
    assert get(protocol, "/v2/health/live")[0] == 200
    assert get(protocol, "/v2/models/toy/ready") == (503, {"name": "toy", "ready": False})
    path = "/v2/models/toy/versions/1/infer"
    model.swap(toys[0])
    assert post(protocol, request, path=path).status == 200
    model.swap(toys[1])
    answer = post(protocol, request, path=path)
    assert (answer.status, b"release 2 is" in answer.body) == (404, True)
    assert json.loads(post(protocol, request).body)["model_version"] == "2"


def test_more_inferences_than_turns_wait_and_then_are_told(toys: list[LoadedRelease]) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold(version: int, outcome: str, seconds: float) -> None:
        entered.set()
        leave.wait(30)

    model = EdgeModel(toys[0], observe=hold)
    protocol = InferenceProtocol(model, "toy", EndpointLimits(running=1, waiting_seconds=0.05))
    answers: list[EndpointReply] = []
    first = threading.Thread(
        target=lambda: answers.append(post(protocol, {"inputs": [tensor()]})), daemon=True
    )
    first.start()
    assert entered.wait(30)
    refused = post(protocol, {"inputs": [tensor()]})
    leave.set()
    first.join(30)
    assert (refused.status, answers[0].status) == (503, 200)
    assert b"busy" in refused.body


def test_outputs_that_are_too_large_are_refused_before_they_are_computed(
    toys: list[LoadedRelease],
) -> None:
    ran: list[int] = []
    model = EdgeModel(toys[0], observe=lambda version, *_: ran.append(version))
    limits = EndpointLimits(output_bytes=4 * 5 * 4)  # four rows of five floats
    protocol = InferenceProtocol(model, "toy", limits)
    assert post(protocol, {"inputs": [tensor()]}).status == 200
    rows = {"shape": [5, 12], "data": [0.0] * 60}
    refused = post(protocol, {"inputs": [tensor(**rows)]})
    assert (refused.status, ran) == (413, [1])
    assert b"outputs may have 80 bytes" in refused.body


def test_what_a_signature_tells_about_outputs() -> None:
    inputs = [Signature("x", "float32", ("n", "m")), Signature("y", "int64", ("dynamic",))]
    outputs = [Signature("a", "float32", ("n", 64)), Signature("b", "float64", ("dynamic", "k", 2))]
    x, y = np.empty((2**20, 0), np.float32), np.empty(7, np.int64)
    assert least_output_bytes(inputs, outputs, {"x": x, "y": y}) == 2**20 * 64 * 4 + 16
    assert least_output_bytes(inputs, outputs, {"x": y, "z": x}) == 64 * 4 + 16


@pytest.mark.parametrize("size", [0, 1, 1 << 14, (1 << 14) + 1, 50_000])
def test_json_that_is_made_in_slices_is_the_same(size: int) -> None:
    array = np.random.default_rng(size).normal(size=size)
    request = InferRequest({}, None, False, None)
    length, text = encode_response(request, {"a": array, "b": array[::-1]}, "toy", 3)
    document = json.loads(text)
    assert length == len(text)
    assert [one["data"] for one in document["outputs"]] == [array.tolist(), array[::-1].tolist()]
    assert text == json.dumps(document, separators=(",", ":")).encode()
