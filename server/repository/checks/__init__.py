"""Checks of a repository: as a device would verify it, and what is wrong and what to do."""
