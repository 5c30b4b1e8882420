"""What to remove and when: plans, their criteria, schedules and allocations, masks, channels.

Functions on numpy arrays, but for `prunecast.compression.pruning.narrowing`, which chooses the
channels of a torch module (needs torch and torch-pruning).
"""
