"""Changes of the fleet's tables, one after the other, as Alembic applies them.

A change of `tables` is a new file in `versions`, and `tables.REVISION` names it. A revision
describes tables in its own words, because what `tables` says goes on changing. There are no
downgrades: restore a backup instead.
"""
