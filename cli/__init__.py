"""The prunecast command."""
