"""What a run keeps to go on from: checkpoints, and the state of each part as arrays and JSON."""
