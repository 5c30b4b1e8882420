"""What a device downloads and runs: rounds to measure on, and the tools that are compared."""
