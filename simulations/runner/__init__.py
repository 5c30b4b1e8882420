"""Runs a scenario on Flower's simulation engine."""
