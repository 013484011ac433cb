"""Rule rewards, one file per family. They run in the sandbox and import neither torch nor ray."""
