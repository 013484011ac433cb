"""Train a recipe with on-policy RL stages: `python jobs/reinforce.py RECIPE --run-dir DIR [key.path=value ...]`.

The path is the one of `terrace run`: an RL stage (`objective: grpo`) is a stage like any other.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("terrace") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from terrace.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
