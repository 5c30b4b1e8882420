"""Entropy coding: adaptive range coder, lane-interleaved rANS, tokens, gaps, tables."""
