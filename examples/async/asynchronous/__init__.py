"""A federation without rounds."""
