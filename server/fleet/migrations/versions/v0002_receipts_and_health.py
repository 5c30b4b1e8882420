"""Ids of reports, and what devices last said about how they are: what was schema 2."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

__all__ = ["down_revision", "revision", "upgrade"]

revision = "0002"
down_revision = "0001"
_NAME = sa.String(64)


def upgrade() -> None:
    """Make the two tables."""
    op.create_table(
        "fleet_receipts",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("device", _NAME, sa.ForeignKey("fleet_devices.id"), nullable=False),
        sa.Column("report", sa.String(64), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.UniqueConstraint("device", "report"),
    )
    op.create_table(
        "fleet_health",
        sa.Column("device", _NAME, sa.ForeignKey("fleet_devices.id"), primary_key=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
    )
