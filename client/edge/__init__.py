"""The agent on a device: verify, patch, activate, self-test, go back, serve inference.

Imports numpy, onnxruntime, tuf and the standard library; never torch, onnx or flwr.
"""

from prunecast.client.edge.agent import Agent
from prunecast.client.edge.config import AGENT_VERSION, AgentConfig, UpdateResult
from prunecast.client.edge.errors import (
    AgentBusy,
    AgentTooOld,
    ContentMissing,
    ContentRefused,
    ControlProblem,
    EdgeError,
    NetworkError,
    NoModel,
    NoRelease,
    OrderRefused,
    StateError,
    TrustError,
    VersionNotActive,
)
from prunecast.client.edge.limits import LimitedFetcher, QuietHours
from prunecast.client.edge.model import EdgeModel, Inference, Observer, Outcome, open_model
from prunecast.client.edge.orders import Order
from prunecast.client.edge.pace import TokenBucket
from prunecast.client.edge.status import read_status
from prunecast.client.edge.transport import Fetcher, HttpFetcher, Stream

__all__ = [
    "AGENT_VERSION",
    "Agent",
    "AgentBusy",
    "AgentConfig",
    "AgentTooOld",
    "ContentMissing",
    "ContentRefused",
    "ControlProblem",
    "EdgeError",
    "EdgeModel",
    "Fetcher",
    "HttpFetcher",
    "Inference",
    "LimitedFetcher",
    "NetworkError",
    "NoModel",
    "NoRelease",
    "Observer",
    "Order",
    "OrderRefused",
    "Outcome",
    "QuietHours",
    "StateError",
    "Stream",
    "TokenBucket",
    "TrustError",
    "UpdateResult",
    "VersionNotActive",
    "open_model",
    "read_status",
]
