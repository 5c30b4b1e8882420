"""Signed ONNX releases: the TUF repository, its payloads, its static server."""
