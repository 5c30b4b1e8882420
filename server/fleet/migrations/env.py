"""What Alembic runs for every command: over the connection and in the transaction of the caller."""

from __future__ import annotations

from alembic import context

from prunecast.server.fleet.tables import REVISION_TABLE, Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=REVISION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
