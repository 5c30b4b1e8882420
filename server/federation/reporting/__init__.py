"""What is told of a run: the byte ledger, events, notices, charts by layer, nodes and metrics."""
