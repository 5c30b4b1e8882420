"""The agent on a device: verify, patch, activate, self-test, go back, serve inference.

Imports numpy, onnxruntime, tuf and the standard library; never torch, onnx or flwr. `updating`
obtains releases, `slots` holds them, `control` follows a fleet (and needs grpcio), `inference`
serves other programs, `telemetry` counts.
"""

from prunecast.client.edge.agent import Agent
from prunecast.client.edge.config import AgentConfig
from prunecast.client.edge.model import EdgeModel, open_model

__all__ = ["Agent", "AgentConfig", "EdgeModel", "open_model"]
