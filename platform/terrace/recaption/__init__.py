"""New captions for pictures: one model writes them, another one says which of them fit, shards hold what is kept."""
