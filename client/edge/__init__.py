"""The agent on a device: verify, patch, activate, self-test, go back, serve inference.

Imports numpy, onnxruntime, tuf and the standard library; never torch, onnx or flwr. `updating`
obtains releases, `slots` holds them, `control` follows a fleet (and needs grpcio), `inference`
serves other programs, `telemetry` counts.
"""

from typing import TYPE_CHECKING

from prunecast.common.lazy import face

if TYPE_CHECKING:
    from prunecast.client.edge.agent import Agent
    from prunecast.client.edge.config import AgentConfig
    from prunecast.client.edge.model import EdgeModel, open_model

__all__ = ["Agent", "AgentConfig", "EdgeModel", "open_model"]

__getattr__, __dir__ = face(
    __name__,
    {
        "Agent": "prunecast.client.edge.agent",
        "AgentConfig": "prunecast.client.edge.config",
        "EdgeModel": "prunecast.client.edge.model",
        "open_model": "prunecast.client.edge.model",
    },
)
