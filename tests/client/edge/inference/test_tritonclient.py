"""Triton's own client against the endpoint; needs ``pip install tritonclient[http]``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from prunecast.client.edge import EdgeModel
from prunecast.client.edge.inference import InferenceServer
from prunecast.client.edge.slots.slot import LoadedRelease
from support.classifier import classifier_inputs
from support.served import classifier_outputs

http = pytest.importorskip("tritonclient.http")
X = classifier_inputs()


@pytest.fixture
def client(toys: list[LoadedRelease]) -> Iterator[object]:
    with InferenceServer(EdgeModel(toys[1]), "toy", "127.0.0.1:0") as server:
        client = http.InferenceServerClient(server.address.removeprefix("http://"))
        yield client
        client.close()


def test_health_and_metadata(client: object) -> None:
    assert client.is_server_live()  # type: ignore[attr-defined]
    assert client.is_server_ready()  # type: ignore[attr-defined]
    assert client.is_model_ready("toy", "2")  # type: ignore[attr-defined]
    assert not client.is_model_ready("toy", "1")  # type: ignore[attr-defined]
    assert client.get_model_metadata("toy")["versions"] == ["2"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("sent", [True, False], ids=["binary in", "JSON in"])
@pytest.mark.parametrize("received", [None, True, False], ids=["default", "binary", "JSON"])
def test_inference(client: object, sent: bool, received: bool | None) -> None:
    given = http.InferInput("input", X.shape, "FP32").set_data_from_numpy(X, binary_data=sent)
    asked = None
    if received is not None:
        asked = [http.InferRequestedOutput("output", binary_data=received)]
    result = client.infer("toy", [given], outputs=asked, request_id="7")  # type: ignore[attr-defined]
    assert result.get_response()["model_version"] == "2"
    assert result.get_response()["id"] == "7"
    assert np.abs(result.as_numpy("output") - classifier_outputs(2, X)).max() < 1e-5


def test_errors_reach_the_caller(client: object) -> None:
    small = np.zeros((1, 3), np.float32)
    given = http.InferInput("input", small.shape, "FP32").set_data_from_numpy(small)
    with pytest.raises(http.InferenceServerException, match="must be float32"):
        client.infer("toy", [given])  # type: ignore[attr-defined]
    large = np.zeros((1 << 20, 12), np.float32)
    given = http.InferInput("input", large.shape, "FP32").set_data_from_numpy(large)
    with pytest.raises(http.InferenceServerException, match="a body may have"):
        client.infer("toy", [given])  # type: ignore[attr-defined]
