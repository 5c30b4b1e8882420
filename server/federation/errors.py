"""Errors of the federation server."""

__all__ = [
    "BudgetError",
    "CheckpointError",
    "CredentialsError",
    "FederationError",
    "NodesFailed",
    "NodesMissing",
    "NonFiniteModel",
    "PolicyError",
    "ReleaseRuleError",
]


class FederationError(RuntimeError):
    """Base of every error that `prunecast.server.federation` raises."""


class PolicyError(FederationError):
    """A policy knob has an unknown name or a value outside its range."""


class NonFiniteModel(FederationError):
    """The global model holds NaN or infinity and cannot be published."""


class CheckpointError(FederationError):
    """A checkpoint file is missing or unusable."""


class CredentialsError(FederationError):
    """A key or certificate is damaged, outdated or not there, or is not to be replaced."""


class ReleaseRuleError(FederationError):
    """Automatic releases are configured in a way that cannot work."""


class ReplyRefused(FederationError):
    """A reply holds what it cannot, given what was sent; strategies see an error in its place."""


class NodesFailed(FederationError):
    """Nodes answered with an error, or not in time, in a run that stops then."""


class NodesMissing(FederationError):
    """Fewer nodes are connected than are needed, for longer than was to be waited."""


class BudgetError(FederationError):
    """A number of bytes that cannot be met: says the least it could be, and why."""
