"""Building and loading models, their parts, attention over segments."""
