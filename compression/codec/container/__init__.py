"""The payload around the symbols: envelope, head, row and column levels."""
