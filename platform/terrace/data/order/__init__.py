"""Which samples come when: a pure function of seed, mixture and index, down to the packs of a step.

In: indexes and a stage. Out: pack specifications, a few hundred bytes each."""
