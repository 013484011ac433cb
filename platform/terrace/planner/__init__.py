"""Parameters, memory, FLOPs, time and cost from the recipe alone."""
