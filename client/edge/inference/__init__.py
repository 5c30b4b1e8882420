"""The active release for other programs on the device, in the Open Inference Protocol (REST)."""

from prunecast.client.edge.inference.errors import EndpointError, RequestRefused
from prunecast.client.edge.inference.limits import EndpointLimits
from prunecast.client.edge.inference.probe import answers
from prunecast.client.edge.inference.protocol import Answer, InferenceProtocol
from prunecast.client.edge.inference.server import InferenceServer

__all__ = [
    "Answer",
    "EndpointError",
    "EndpointLimits",
    "InferenceProtocol",
    "InferenceServer",
    "RequestRefused",
    "answers",
]
