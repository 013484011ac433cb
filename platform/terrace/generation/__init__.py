"""Engines that answer: prompts in as token ids, responses out with their log-probabilities. Used by rl and evaluate.

In: prompts and the weights of a model. Out: responses."""
