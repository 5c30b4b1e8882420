"""The published model and its payloads: keyframe, delta, reuse, update."""
