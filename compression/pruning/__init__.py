"""What to remove and when: plans, their criteria, schedules and allocations, masks, channels.

Functions on numpy arrays, but for what needs torch: `prunecast.compression.pruning.narrowing`
chooses the channels of a module (and needs torch-pruning), `holding` keeps masks while it trains,
`measuring` looks at gradients and activations, `modules` does all of it without a federation.
"""
