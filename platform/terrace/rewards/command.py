"""`terrace serve-rewards RECIPE`: serve the rewards that a recipe's grpo stage names."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

from terrace.errors import InputError


def register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("serve-rewards", help="serve a stage's rewards over HTTP (Ray Serve)")
    parser.add_argument("recipe", help="recipe file")
    parser.add_argument("overrides", nargs="*", default=[], help="key.path=value")
    parser.add_argument("--stage", help="stage name; default: the only grpo stage")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus-per-replica", type=float, default=0.0, help="GPUs of a replica, for reward models (device: cuda)")
    parser.add_argument("--max-waiting-items", type=int, default=4096, help="responses that wait in a replica; 429 to more")
    parser.add_argument("--sandbox-workers", type=int, default=2, help="killable processes per replica")
    parser.add_argument("--item-seconds", type=float, default=5.0, help="time limit of one response")
    parser.add_argument("--token-env", default="TERRACE_REWARD_TOKEN", help="environment variable that holds the token")
    parser.add_argument("--no-token", action="store_true", help="no authentication; only allowed on a loopback address")
    parser.set_defaults(main=main)


def stage_with_rewards(path: str, overrides: Sequence[str], name: str | None) -> Any:
    """The stage `name` of a recipe, or its only stage with rewards. Raises InputError if there is none or several."""
    from terrace.recipe.loading import load_recipe

    recipe = load_recipe(path, overrides)
    stages = [stage for stage in recipe.stages if stage.rewards and name in (None, stage.name)]
    if len(stages) != 1:
        names = ", ".join(stage.name for stage in recipe.stages if stage.rewards) or "none"
        raise InputError(f"{path}: name one stage with rewards by --stage (it has: {names})")
    return stages[0]


def main(args: argparse.Namespace) -> int:
    """Start the service and wait until it is interrupted."""
    stage = stage_with_rewards(args.recipe, args.overrides, args.stage)
    token = None if args.no_token else os.environ.get(args.token_env)
    if token is None and not args.no_token:
        raise InputError(
            f"set the environment variable {args.token_env} to a token (or give --no-token on a loopback address)"
        )
    if args.no_token and args.host not in ("127.0.0.1", "localhost", "::1"):
        raise InputError(f"--no-token is only for a loopback address, not {args.host}")
    from ray import serve

    from terrace.rewards.service import serve_application

    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(
        serve_application(
            stage.rewards, token, args.replicas, args.sandbox_workers, args.item_seconds,
            gpus_per_replica=args.gpus_per_replica, max_waiting_items=args.max_waiting_items,
        ),
        name="rewards",
        route_prefix="/",
    )
    print(f"rewards of stage {stage.name} at http://{args.host}:{args.port}/score (health: /health)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()
    return 0
