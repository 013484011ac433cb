"""Files on this machine and on S3, conditional writes, and a run directory that lives on S3: what data, runs and checkpoints share.

In and out: bytes under a path or a URI. Knows nothing of what they mean."""
