"""The training step and loop, optimizer, precision and checkpoints."""
