"""Groups, devices, rollouts, reports and the audit log: where upgrades begin, at schema 1."""

__all__ = ["down_revision", "revision", "upgrade"]

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Nothing: new databases have the latest tables at once."""
