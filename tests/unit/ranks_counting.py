"""Control and run a stage that only counts: `ranks_counting.py RUN_DIR STEPS WORKERS [process]`, one of several processes or alone."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fakes import fake_stage, tiny_recipe


def lead() -> int:
    from terrace.cluster.process_launcher import ProcessLauncher
    from terrace.cluster.ranks_launcher import RanksLauncher
    from terrace.curriculum.run import run_curriculum
    from terrace.track.progress import Display

    recipe = tiny_recipe(2, steps=int(sys.argv[2]), resources={"workers": int(sys.argv[3])})
    launcher = ProcessLauncher if sys.argv[4:] == ["process"] else RanksLauncher
    with Display() as display:
        outcome = run_curriculum(recipe, Path(sys.argv[1]), launcher(recipe, fake_stage), display, prepare=lambda *_: {})
    print(outcome.message)
    return outcome.exit_status


if __name__ == "__main__":
    from terrace.cluster.ranks_worker import led

    sys.exit(lead() if sys.argv[4:] == ["process"] else led(lead, fake_stage))
