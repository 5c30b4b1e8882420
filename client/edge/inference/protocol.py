"""The Open Inference Protocol over any transport: a request in, an answer out; no sockets."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from prunecast.client.edge.config import AGENT_VERSION
from prunecast.client.edge.errors import NoModel, RequestRefused, VersionNotActive
from prunecast.client.edge.inference.messages import (
    DATATYPE_NAMES,
    encode_response,
    least_output_bytes,
    parse_request,
    response_bytes,
    size_of,
    unpaid_values,
)
from prunecast.client.edge.model import EdgeModel
from prunecast.compression.release import InputRefused, OutOfMemory, OutOfTime, ReleaseError
from prunecast.compression.release.runtime import Signature

__all__ = [
    "SMALL",
    "Budget",
    "EndpointLimits",
    "EndpointReply",
    "InferenceProtocol",
]

SMALL = 1 << 20
"""Bytes of a body or answer up to which it is small, and finds memory where large ones wait."""


@dataclass(frozen=True)
class EndpointLimits:
    """Bounds of the endpoint.

    Attributes:
        body_bytes: of one request.
        json_bytes: of the JSON in it; parsed, JSON takes up to twenty times its size, so only one
            large document is parsed at a time.
        total_bytes: of all bodies that are in memory at a time; an eighth of it is kept for
            small ones.
        output_bytes: of all outputs of one inference; where the model's signature tells what
            an input leads to, it does not even run.
        json_output_bytes: of their values as JSON; more must be asked for as binary data.
        answers_bytes: of all large answers that are in memory at a time.
        connections: open at a time; one more is answered 503 and closed.
        running: inferences at a time; others wait. One turn is kept for requests with small bodies.
        inference_seconds: after which an inference is broken off and answered 504.
        waiting_seconds: how long a request waits for memory or for its turn before it is
            answered 503.
        request_seconds: from the first byte of a request to its last, and for the answer.
        idle_seconds: how long a connection may stay open between requests.
        closing_seconds: how long requests in progress may take when the endpoint ends.
    """

    body_bytes: int = 16 * 2**20
    json_bytes: int = 4 * 2**20
    total_bytes: int = 64 * 2**20
    output_bytes: int = 64 * 2**20
    json_output_bytes: int = 16 * 2**20
    answers_bytes: int = 128 * 2**20
    connections: int = 32
    running: int = 4
    inference_seconds: float = 30.0
    waiting_seconds: float = 5.0
    request_seconds: float = 30.0
    idle_seconds: float = 60.0
    closing_seconds: float = 10.0


class Budget:
    """A number of units that requests share: bytes of memory, or turns.

    Args:
        units: how many there are.
        what: the name of the units in errors.
    """

    def __init__(self, units: int, what: str) -> None:
        self._units, self._free, self._what = units, units, what
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        """How many units are held at this moment."""
        return self._units - self._free

    @contextmanager
    def take(self, units: int, seconds: float, *, leave: int = 0) -> Iterator[None]:
        """Hold so many units while the block runs; wait for them at most `seconds`.

        Args:
            units: how many; as many as there are, if it is more.
            seconds: to wait.
            leave: units that must stay free for others.

        Raises:
            RequestRefused: 503, they did not become free.
        """
        units = min(units, self._units - leave)
        with self._changed:
            if not self._changed.wait_for(lambda: self._free - leave >= units, timeout=seconds):
                raise RequestRefused(503, f"busy: no {self._what} became free, try again")
            self._free -= units
        try:
            yield
        finally:
            with self._changed:
                self._free += units
                self._changed.notify_all()


_MODEL = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(?:/(ready|infer))?")
_MOST_UNPAID = 1 << 16
_LARGE_JSON = 64 * 2**10
_MOST_TEXT = 500
_JSON = "application/json"


@dataclass(frozen=True)
class EndpointReply:
    """What goes back to the client.

    Attributes:
        status: of HTTP.
        body: of the answer.
        headers: besides its length.
        held: memory that is taken until `held` is closed, when the answer has been sent.
    """

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": _JSON})
    held: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def json(cls, status: int, document: object) -> EndpointReply:
        """An answer of one JSON document."""
        return cls(status, json.dumps(document).encode())

    @classmethod
    def error(cls, status: int, message: str) -> EndpointReply:
        """An error as the protocol wants it."""
        return cls.json(status, {"error": message[:_MOST_TEXT]})


class InferenceProtocol:
    """Answers requests about one model; safe from several threads.

    Every answer about the model is made from one release: the one that was active when the request
    was taken up. An answer to an inference states it.

    Args:
        model: whatever release is active.
        name: under which it is served.
        limits: what requests may cost.

    Attributes:
        limits: the same.
        answers: memory for large answers.
    """

    def __init__(self, model: EdgeModel, name: str, limits: EndpointLimits | None = None) -> None:
        self.limits = limits or EndpointLimits()
        self._model, self._name = model, name
        self._turns = Budget(self.limits.running, "turn")
        self.answers = Budget(self.limits.answers_bytes, "memory")
        self._parsing = threading.Lock()

    @property
    def running(self) -> int:
        """How many inferences run at this moment."""
        return self._turns.taken

    def answer(
        self, method: str, path: str, body: memoryview, json_bytes: str | None = None
    ) -> EndpointReply:
        """Answer one request; whatever is wrong with it becomes an answer too.

        Args:
            path: as it stands in the request, without the query.
            json_bytes: the header ``Inference-Header-Content-Length``.
        """
        try:
            return self._route(method, unquote(path), body, json_bytes)
        except RequestRefused as error:
            return EndpointReply.error(error.status, str(error))
        except InputRefused as error:
            return EndpointReply.error(400, str(error))
        except NoModel as error:
            return EndpointReply.error(503, str(error))
        except VersionNotActive as error:
            return EndpointReply.error(404, str(error))
        except OutOfTime as error:
            return EndpointReply.error(504, f"{error}: send fewer rows at a time")
        except OutOfMemory as error:
            return EndpointReply.error(413, f"{error}: send fewer rows at a time")
        except ReleaseError as error:
            return EndpointReply.error(500, str(error))
        except MemoryError:
            return EndpointReply.error(503, "the device is out of memory: send less at a time")

    def _route(
        self, method: str, path: str, body: memoryview, json_bytes: str | None
    ) -> EndpointReply:
        fixed: dict[str, Callable[[], EndpointReply]] = {
            "/v2": self._server,
            "/v2/health/live": lambda: EndpointReply.json(200, {"live": True}),
            "/v2/health/ready": self._ready,
        }
        path = path.rstrip("/")
        if path in fixed:
            _only("GET", method)
            return fixed[path]()
        found = _MODEL.fullmatch(path)
        if not found:
            raise RequestRefused(404, "no such path: the Open Inference Protocol begins at /v2")
        name, version, verb = found.groups()
        if name != self._name:
            raise RequestRefused(404, f"no model {name[:80]!r}: this device serves {self._name!r}")
        number = _number(version)
        if verb == "infer":
            _only("POST", method)
            return self._infer(number, body, json_bytes)
        _only("GET", method)
        return self._model_ready(number) if verb == "ready" else self._metadata(number)

    def _server(self) -> EndpointReply:
        return EndpointReply.json(
            200,
            {
                "name": "prunecast",
                "version": AGENT_VERSION,
                "extensions": ["binary_tensor_data"],
            },
        )

    def _ready(self) -> EndpointReply:
        ready = self._model.version is not None
        # the specification's text calls the field "live", its servers call it "ready"
        return EndpointReply.json(200 if ready else 503, {"ready": ready, "live": True})

    def _model_ready(self, version: int | None) -> EndpointReply:
        ready = self._model.version is not None
        if ready:
            self._model.current(version)
        return EndpointReply.json(200 if ready else 503, {"name": self._name, "ready": ready})

    def _metadata(self, version: int | None) -> EndpointReply:
        loaded = self._model.current(version)
        return EndpointReply.json(
            200,
            {
                "name": self._name,
                "versions": [str(loaded.manifest.version)],
                "platform": "onnxruntime_onnx",
                "inputs": [_described(s) for s in loaded.session.inputs],
                "outputs": [_described(s) for s in loaded.session.outputs],
            },
        )

    def _infer(
        self, version: int | None, body: memoryview, json_bytes: str | None
    ) -> EndpointReply:
        size = len(body)
        if json_bytes is not None:
            if not (json_bytes.isascii() and json_bytes.isdigit() and len(json_bytes) < 16):
                raise RequestRefused(400, "Inference-Header-Content-Length must be a number")
            size = int(json_bytes)
        if size > len(body):
            raise RequestRefused(400, "Inference-Header-Content-Length goes beyond the body")
        if size > self.limits.json_bytes:
            raise RequestRefused(
                413, f"JSON may have {self.limits.json_bytes} bytes: send binary tensor data"
            )
        limits = self.limits
        kept = 1 if len(body) > SMALL and limits.running > 1 else 0
        with self._turns.take(1, limits.waiting_seconds, leave=kept):
            with self._parsing if len(body) > _LARGE_JSON else nullcontext():
                request = parse_request(body, size)
            self._check_sizes(request.inputs)
            served = self._model.infer(
                request.inputs, version=version, seconds=limits.inference_seconds
            )
            self._check_outputs(sum(map(size_of, served.outputs.values())))
            most = response_bytes(request, served.outputs, limits.json_output_bytes)
            with ExitStack() as taken:
                if most > SMALL:
                    taken.enter_context(self.answers.take(most, limits.waiting_seconds))
                length, whole = encode_response(
                    *(request, served.outputs, self._name, served.version, limits.json_output_bytes)
                )
                held = taken.pop_all()
        if not any((request.outputs or {"": request.binary}).values()):
            return EndpointReply(200, whole, held=held)
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(length),
        }
        return EndpointReply(200, whole, headers, held)

    def _check_sizes(self, inputs: Mapping[str, NDArray[np.generic]]) -> None:
        """Refuse what surely costs too much, before it does."""
        session = self._model.current().session
        if unpaid_values(session.inputs, inputs) > _MOST_UNPAID:
            raise RequestRefused(
                400, f"an empty tensor's other free sizes may have a product of {_MOST_UNPAID}"
            )
        self._check_outputs(least_output_bytes(session.inputs, session.outputs, inputs))

    def _check_outputs(self, size: int) -> None:
        if size > self.limits.output_bytes:
            raise RequestRefused(
                413, f"outputs may have {self.limits.output_bytes} bytes: send fewer rows at a time"
            )


def _only(wanted: str, method: str) -> None:
    if method != wanted:
        raise RequestRefused(405, f"this path answers {wanted} alone")


def _number(version: str | None) -> int | None:
    if version is None:
        return None
    if not (version.isascii() and version.isdigit() and len(version) < 16):
        raise RequestRefused(404, f"no version {version[:80]!r}: versions are numbers")
    return int(version)


def _described(signature: Signature) -> dict[str, Any]:
    return {
        "name": signature.name,
        "datatype": DATATYPE_NAMES[signature.dtype],
        "shape": [n if isinstance(n, int) else -1 for n in signature.shape],
    }
