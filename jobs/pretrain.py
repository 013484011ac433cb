"""Train a recipe's stages: `python jobs/pretrain.py RECIPE --run-dir DIR [key.path=value ...]` is `terrace run`.

Also the entry point of a Ray job: `ray job submit --working-dir . -- python jobs/pretrain.py jobs/recipes/demo.yaml
--run-dir ...` Works where the package is not installed: the repository's `platform/` is then put on the path here and
in the workers.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("terrace") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from terrace.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
