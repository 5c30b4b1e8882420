"""The audit log holds kinds and fields instead of English; the schema's number leaves the settings.

Entries that are there keep their words as the field ``text``.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

__all__ = ["down_revision", "revision", "upgrade"]

revision = "0003"
down_revision = "0002"
_AT_ONCE = 1000


def upgrade() -> None:
    """Turn the entries, a thousand at a time, and then the columns."""
    connection = op.get_bind()
    op.add_column("fleet_audit", sa.Column("fields", sa.JSON()))
    audit = sa.table(
        "fleet_audit",
        *(sa.column("number", sa.Integer), sa.column("action", sa.String)),
        *(sa.column("detail", sa.Text), sa.column("fields", sa.JSON)),
    )
    last = 0
    while True:
        wanted = sa.select(audit.c.number, audit.c.detail).where(audit.c.number > last)
        rows = connection.execute(wanted.order_by(audit.c.number).limit(_AT_ONCE)).all()
        if not rows:
            break
        last = rows[-1].number
        turned = audit.update().where(audit.c.number == sa.bindparam("old"))
        values = [{"old": row.number, "made": {"text": row.detail}} for row in rows]
        connection.execute(turned.values(fields=sa.bindparam("made", type_=sa.JSON)), values)
    connection.execute(audit.update().values(action=sa.func.replace(audit.c.action, " ", "_")))
    with op.batch_alter_table("fleet_audit") as batch:
        batch.alter_column("action", new_column_name="kind", existing_type=sa.String(32))
        batch.alter_column("fields", existing_type=sa.JSON(), nullable=False)
        batch.drop_column("detail")
    meta = sa.table("fleet_meta", sa.column("key", sa.String))
    connection.execute(meta.delete().where(meta.c.key == "schema"))
