"""How parameters and gradients are spread over ranks: one file per strategy."""
