"""Raw rows and tars as people have them become samples in shards, and every one that does not is refused by name.

In: files, folders and objects of a source. Out: WebDataset tars and an ingest report."""
