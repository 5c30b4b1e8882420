"""Which weights a version keeps: the pruner, what it goes by, and what people are told of it."""
