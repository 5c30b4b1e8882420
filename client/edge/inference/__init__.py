"""The active release for other programs on the device, in the Open Inference Protocol (REST)."""

from prunecast.client.edge.inference.address import is_answering
from prunecast.client.edge.inference.limits import EndpointError, EndpointLimits, RequestRefused
from prunecast.client.edge.inference.protocol import EndpointReply, InferenceProtocol
from prunecast.client.edge.inference.server import InferenceServer

__all__ = [
    "EndpointError",
    "EndpointLimits",
    "EndpointReply",
    "InferenceProtocol",
    "InferenceServer",
    "RequestRefused",
    "is_answering",
]
