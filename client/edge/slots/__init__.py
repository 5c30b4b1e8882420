"""Slots: folders that hold one complete release each, and how its model is opened."""
