"""The active release for other programs on the device, in the Open Inference Protocol (REST)."""

from prunecast.client.edge.inference.address import is_answering
from prunecast.client.edge.inference.protocol import EndpointLimits, InferenceProtocol
from prunecast.client.edge.inference.server import InferenceServer

__all__ = ["EndpointLimits", "InferenceProtocol", "InferenceServer", "is_answering"]
