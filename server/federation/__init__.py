"""The Flower grid that compresses, the publisher of versions, the byte ledger."""
