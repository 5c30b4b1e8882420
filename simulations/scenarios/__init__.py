"""Scenario files: what a simulation trains, on what data, with which arms."""
