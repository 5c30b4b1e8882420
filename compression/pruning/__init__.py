"""What to remove and when: plans, their criteria, schedules and allocations, masks.

Functions on numpy arrays. `structure/` removes channels, heads and layers, and narrows modules to
what remains (choosing needs torch-pruning); `training/` holds masks while a torch module trains,
looks at its gradients and activations, and prunes it without a federation. `counting` needs torch.
"""
