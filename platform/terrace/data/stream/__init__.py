"""Pack specifications become the examples that a worker trains on, read and decoded anywhere in the cluster.

In: pack specifications. Out: packed examples, in exact order, from any step."""
