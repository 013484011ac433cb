"""A trainer that has opened vLLM and waits to be killed: python open_and_wait.py FOLDER"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from vllm_world import world_of

    world = world_of("qwen2_5_vl", Path(sys.argv[1]))
    model = world.model(1)
    with world.vllm() as engine:
        engine.update_weights(model.named_parameters)
        print("opened", flush=True)
        time.sleep(600)
