"""Parts of the rollout benchmark: a small repository, and a fleet of processes."""
