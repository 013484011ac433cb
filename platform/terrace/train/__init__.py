"""One loop that trains a stage of any objective (`loop.py`), its step, strategies, optimizer, precision and checkpoints.

In: a recipe's stage, a feed, an objective, the weights to start from. Out: metrics, checkpoints, `final/`. It asks nobody above:
suites and result.json are the business of curriculum.attempt_worker."""
