"""One Parquet per source: where every healthy sample lies, and what its length at any resolution follows from.

In: shards. Out: numpy columns on which lengths are arithmetic."""
