"""Data sets and their partitions over clients."""
