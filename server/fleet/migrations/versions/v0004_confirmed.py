"""Devices confirm what they have activated: final answers, windows that are over, and reasons.

What was ``succeeded`` before is taken for ``confirmed``. Why a version failed on a device is found
in the reports that were kept.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

__all__ = ["down_revision", "revision", "upgrade"]

revision = "0004"
down_revision = "0003"
_DEVICES = sa.table(
    "fleet_devices",
    *(sa.column(n, sa.String) for n in ("id", "told_outcome", "part_progress", "part_rollout")),
    sa.column("part_epoch", sa.Integer),
    sa.column("failures", sa.JSON),
)
_ROLLOUTS = sa.table(
    "fleet_rollouts",
    *(sa.column("id", sa.String), sa.column("status", sa.String), sa.column("since", sa.Double)),
    *(sa.column("epoch", sa.Integer), sa.column("completed", sa.Double)),
    sa.column("windows", sa.JSON),
)
_REPORTS = sa.table(
    "fleet_reports",
    *(sa.column("device", sa.String), sa.column("version", sa.BigInteger)),
    *(sa.column("outcome", sa.String), sa.column("detail", sa.Text), sa.column("at", sa.Double)),
    sa.column("number", sa.Integer),
)


def upgrade() -> None:
    """Rename, add, and fill what is new from what is there."""
    # batches copy tables, and others refer to these
    op.execute("ALTER TABLE fleet_rollouts RENAME COLUMN succeeded TO confirmed")
    op.execute("ALTER TABLE fleet_devices RENAME COLUMN refused TO failures")
    op.add_column("fleet_rollouts", sa.Column("windows", sa.JSON()))
    op.add_column("fleet_rollouts", sa.Column("completed", sa.Double()))
    connection = op.get_bind()
    for table, column in (
        (_DEVICES, "told_outcome"),
        (_DEVICES, "part_progress"),
        (_REPORTS, "outcome"),
    ):
        old = table.c[column] == "succeeded"
        connection.execute(table.update().where(old).values({column: "confirmed"}))
    done = _ROLLOUTS.c.status == "completed"
    connection.execute(_ROLLOUTS.update().where(done).values(completed=_ROLLOUTS.c.since))
    for row in connection.execute(sa.select(_ROLLOUTS.c.id, _ROLLOUTS.c.epoch)).all():
        mine = _ROLLOUTS.c.id == row.id
        windows = _windows(connection, row.id, row.epoch)
        connection.execute(_ROLLOUTS.update().where(mine).values(windows=windows))
    for row in connection.execute(sa.select(_DEVICES.c.id, _DEVICES.c.failures)).all():
        if row.failures:
            found = [_failure(connection, row.id, version) for version in row.failures]
            mine = _DEVICES.c.id == row.id
            connection.execute(_DEVICES.update().where(mine).values(failures=found))


def _windows(connection: sa.Connection, rollout: str, epoch: int) -> list[dict[str, int]]:
    """What devices that are still there settled as, in each window before the present one.

    What failed in these did not stop the rollout, or an operator went on nevertheless.
    """
    names = ("confirmed", "silent")
    windows = [dict.fromkeys((*names, "failed"), 0) for _ in range(epoch - 1)]
    settled = sa.select(_DEVICES.c.part_epoch, _DEVICES.c.part_progress, sa.func.count()).where(
        _DEVICES.c.part_rollout == rollout, _DEVICES.c.part_progress.in_(names)
    )
    grouped = settled.group_by(_DEVICES.c.part_epoch, _DEVICES.c.part_progress)
    for number, progress, count in connection.execute(grouped).tuples():
        if 1 <= number < epoch:
            windows[number - 1][progress] = count
    return windows


def _failure(connection: sa.Connection, device: str, version: int) -> dict[str, Any]:
    """The last report of a failure; without one, an operator knows at least the version."""
    told = sa.select(_REPORTS).where(
        _REPORTS.c.device == device,
        _REPORTS.c.version == version,
        _REPORTS.c.outcome != "confirmed",
    )
    row = connection.execute(told.order_by(_REPORTS.c.number.desc()).limit(1)).first()
    if row is None:
        return {"version": version, "outcome": "rolled back", "detail": "", "at": 0.0}
    return {"version": version, "outcome": row.outcome, "detail": row.detail[:200], "at": row.at}
