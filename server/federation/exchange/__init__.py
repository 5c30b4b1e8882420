"""One exchange with nodes: what goes out, what comes back, and when a round is over."""
