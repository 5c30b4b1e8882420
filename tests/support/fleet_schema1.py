"""The tables of schema 1, as the first version made them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

_NAME = sa.String(64)


def make_schema_1(connection: sa.Connection) -> None:
    op = Operations(MigrationContext.configure(connection))
    op.create_table(
        "fleet_meta",
        sa.Column("key", sa.String(32), primary_key=True),
        sa.Column("value", sa.Text(), nullable=False),
    )
    op.create_table(
        "fleet_rollouts",
        sa.Column("id", _NAME, primary_key=True),
        sa.Column("release", _NAME, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        *(
            sa.Column(name, sa.JSON(), nullable=False)
            for name in ("groups", "stages", "policy", "cohorts")
        ),
        sa.Column("since", sa.Double(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False, index=True),
        *(
            sa.Column(name, sa.Integer(), nullable=False)
            for name in ("stage", "epoch", "expected", "succeeded", "failed", "silent")
        ),
        sa.Column("told", sa.Integer(), nullable=False),
        sa.Column("settled", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("started", sa.Double(), nullable=False),
    )
    op.create_table(
        "fleet_groups",
        sa.Column("id", _NAME, primary_key=True),
        sa.Column("release", _NAME, nullable=False),
        sa.Column("stable", sa.BigInteger()),
        sa.Column("pin", sa.BigInteger()),
        sa.Column("rollout", _NAME, sa.ForeignKey("fleet_rollouts.id")),
    )
    op.create_table(
        "fleet_devices",
        sa.Column("id", _NAME, primary_key=True),
        sa.Column("group_id", _NAME, sa.ForeignKey("fleet_groups.id"), nullable=False, index=True),
        sa.Column("pin", sa.BigInteger()),
        sa.Column("revoked", sa.Boolean(), nullable=False),
        sa.Column("running", sa.BigInteger()),
        sa.Column("agent", sa.String(64), nullable=False),
        sa.Column("last_seen", sa.Double()),
        sa.Column("refused", sa.JSON(), nullable=False),
        sa.Column("serial", sa.Integer(), nullable=False),
        sa.Column("told_version", sa.BigInteger()),
        sa.Column("told_at", sa.Double()),
        sa.Column("told_rollout", _NAME),
        sa.Column("told_outcome", sa.String(32)),
        sa.Column("part_rollout", _NAME),
        sa.Column("part_stage", sa.Integer()),
        sa.Column("part_progress", sa.String(16)),
        sa.Column("part_told_at", sa.Double()),
        sa.Column("part_epoch", sa.Integer()),
        sa.Index("fleet_devices_overdue", "part_rollout", "part_progress", "part_told_at"),
    )
    op.create_table(
        "fleet_tokens",
        sa.Column("hash", sa.String(64), primary_key=True),
        sa.Column("device", _NAME, sa.ForeignKey("fleet_devices.id"), nullable=False, index=True),
        sa.Column("created", sa.Double(), nullable=False),
    )
    op.create_table(
        "fleet_reports",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("device", _NAME, nullable=False, index=True),
        sa.Column("serial", sa.Integer(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("rollout", _NAME),
        sa.Column("outcome", sa.String(32), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
    )
    op.create_table(
        "fleet_audit",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(80), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("subject", _NAME, nullable=False, index=True),
        sa.Column("detail", sa.Text(), nullable=False),
    )
