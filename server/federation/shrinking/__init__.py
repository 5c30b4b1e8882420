"""Channels, heads and layers that go while a federation trains."""
