"""Cases, coders, measuring and reporting behind ``benchmarks/codec.py``."""
