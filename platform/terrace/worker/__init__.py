"""What a training process knows of its surroundings, and the few messages between its ranks. Nothing of Ray.

In: rank, device, how to report, when to stop, from whoever started it. Out: a context that every layer above reads."""
