"""What a step optimises: one file per objective, named in recipe.objectives, behind the protocol of `interface.py`.

In: examples of a feed and the model. Out: their weights in the divisor, their summed loss, figures for metrics, own state."""
