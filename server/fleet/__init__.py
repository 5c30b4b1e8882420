"""A fleet of edge devices under control: groups, staged rollouts, pins, roll-back.

`machine.apply` decides without file, socket, clock or generator, on the values of `model` and the
events of `events`. `service.FleetService` keeps the state in a database and is what a wire service
calls; what devices show and say is in `reports`.
"""
