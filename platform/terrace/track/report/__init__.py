"""The HTML report of a run: read from its directory and nothing else.

In: a run directory. Out: one page."""
