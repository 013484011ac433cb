"""Shards, index, order, packs and the stream of packs to the workers."""
