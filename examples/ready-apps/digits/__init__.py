"""A model and data for the ready apps."""
