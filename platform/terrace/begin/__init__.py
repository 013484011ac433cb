"""Beginning: a recipe made from a checkpoint and rows that somebody has, with every decision said."""
