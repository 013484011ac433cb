"""What the loop (train.loop) asks of an objective, so that one loop trains a stage of any.

An objective is one class in one file, named in recipe.objectives. The base class below answers every question that most
objectives answer alike; what a new one must write is `loss`, `weight`, `batch` and `empty`. In the order of a stage:

    open_objective(opening)      before the model exists: the loss that the strategy wraps comes from here
    begin(run)                   the model is there, resumed: change its attention, open engines, load references
    evaluate(alive)              before, in the middle, after
    steps(start)                 what each step takes, in order
      count, weight              what it holds; weights summed over all ranks are the divisor of the loss
      before, batch, loss, seen  the step itself, example by example
      values                     the objective's own metrics of the step
      after_step, saved          once its line is written; once a checkpoint is
    state / load                 its own tensors in checkpoints, by name (momentum copies, queues)
    finished, close              its files may go; its engines must

Every rank runs the same calls in the same order; `opening.gather` and `opening.total` are the collectives that an objective needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from terrace.data.types import PackedExample
from terrace.models.precision import DTYPES
from terrace.models.sequence_parallel import SequenceGroup
from terrace.recipe.schema import Recipe, Stage
from terrace.worker.collectives import gather_rows, sum_over_ranks
from terrace.worker.context import WorkerContext


class Counted:
    """A field that takes a whole number, or the function that finds it: that is called once, when the number is first asked for."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, holder: Any, owner: type | None = None) -> int:
        if holder is None:
            raise AttributeError(self._name)  # so the field has no default
        value = getattr(holder, self._name)
        if callable(value):
            value = int(value())
            setattr(holder, self._name, value)
        return value

    def __set__(self, holder: Any, value: int | Callable[[], int]) -> None:
        setattr(holder, self._name, value)


@dataclass
class StageFeed:
    """What a stage trains on, as one value: how many steps, this rank's examples, the place in the order.

    `stream(start)` yields the steps from `start` to the last one. `state(step)` is the place in the data order after
    `step` steps, a few integers that a checkpoint keeps; `restore(state)` accepts it again, and raises InputError if
    the order is another one by now. The loop does not care where examples come from: a benchmark or a test trains on
    packs made in memory and needs neither shards nor Ray.

    `total_steps` may be given as a function: counting the steps of an epoch means planning all of it, and a resumed stage has the
    number in its checkpoint. So nobody asks before `restore`.
    """

    config: Any  # the model's transformers configuration, token ids filled in
    total_steps: Counted = Counted()
    stream: Callable[[int], Iterator[Any]]
    state: Callable[[int], dict[str, Any]]
    restore: Callable[[dict[str, Any]], None]
    held_out: Any = field(default_factory=dict)  # what the objective's `evaluate` reads; packs per sample kind for most
    tokenizer_dir: Path | None = None


@dataclass(frozen=True)
class Opening:
    """What an objective knows before the model exists."""

    recipe: Recipe
    stage: Stage
    feed: StageFeed
    context: WorkerContext
    stage_dir: Path
    start_weights: Path | None = None
    sequence: SequenceGroup | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stage.precision]

    def gather(self, values: Sequence[float]) -> Any:
        """float64 [ranks, len(values)]: every rank's row, on every rank."""
        return gather_rows(values, self.context)

    def total(self, values: Sequence[float]) -> Any:
        """float64 [len(values)]: the sum of every rank's row, on every rank."""
        return sum_over_ranks(values, self.context)


@dataclass(frozen=True)
class StageRun:
    """What an objective knows once the model is there. `strategy` is a train.strategies.interface.Strategy."""

    strategy: Any
    notify: Callable[[str, dict[str, Any]], None]  # tells the observers, on rank 0
    mark: Callable[[int, str], None]  # tells the watchdog: (step from 1, what begins)
    rest: Callable[[], None] = lambda: None  # tells the watchdog that until the next mark nothing counts as a hang


@dataclass
class StepExamples:
    """What this rank takes in a step (`step` from 0). A checkpoint may be written after it only at a `boundary`."""

    step: int
    examples: list[Any]
    wait_seconds: float = 0.0
    boundary: bool = True
    damaged_samples: int = 0  # that this rank could not read, of sources with `on_damage: skip`, beside those that packs name


@dataclass
class Counts:
    """What examples hold. Those of all ranks add up to what metrics.jsonl says of the step."""

    supervised_tokens: int = 0
    tokens: int = 0
    samples: int = 0
    visual_tokens: int = 0
    rows: int = 0  # of the packs that are filled
    cost: float = 0.0  # relative work, for the balance of ranks; 0 if it is not known
    damaged_samples: int = 0
    replaced_samples: int = 0
    samples_per_source: Mapping[str, int] = field(default_factory=dict)


class Objective:
    """See the module's docstring. A subclass answers what it answers differently."""

    coupled = False  # the examples of the whole global batch meet in the loss: every rank must hold equally many
    measured = False  # a step is training alone, on packs of the data path: FLOP/s, samples per second and memory are told
    ends_with_its_samples = True  # a step without a sample on any rank ends the stage; else it is skipped
    skipped_in_a_row = 32  # steps without an optimizer step in a row, after which the stage stops
    random_rule = "seeded per step"
    unready_prompts = 0  # that its rewards cannot judge and that it leaves out, of sources with `on_unready: skip`

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self.run: StageRun | None = None

    @property
    def strategy(self) -> Any:
        assert self.run is not None, "the objective has not begun"
        return self.run.strategy

    # ------------------------------------------------------------ a stage

    def begin(self, run: StageRun) -> None:
        self.run = run

    def steps(self, start: int) -> Iterator[StepExamples]:
        """What this rank takes in each step from `start` (from 0) on."""
        for given in self.opening.feed.stream(start):
            yield given if isinstance(given, StepExamples) else StepExamples(given.step, given.packs, given.wait_seconds)

    def evaluate(self, alive: Callable[[], None]) -> dict[str, float]:
        """Figures of held-out examples, the same on every rank. `alive` is called before whatever may take long."""
        return {}

    def finished(self) -> None:
        """The stage is trained and exported."""

    def close(self) -> None:
        """Let go of processes and memory; called more than once."""
        self.run = None  # the strategy holds this objective's loss: the two would keep each other

    # ------------------------------------------------------------ a step

    def weight(self, example: Any) -> float:
        """What the example adds to the divisor of the loss: supervised tokens, pairs, response tokens, patches."""
        raise NotImplementedError

    def count(self, taken: StepExamples) -> Counts:
        """What this rank's examples hold."""
        return Counts(samples=len(taken.examples))

    def empty(self) -> Any:
        """An example that weighs nothing and runs the same collectives: ranks with fewer examples than others are filled up."""
        raise NotImplementedError

    def before(self, examples: Sequence[Any], scale: float) -> None:
        """Before the first backward: a pass without gradient, a reference, a teacher. `scale` is 1 / divisor."""

    def batch(self, example: Any) -> Any:
        """The example on the device, as `loss` takes it."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        """Float32 scalar, summed over the example: what every strategy wraps."""
        raise NotImplementedError

    def seen(self, example: Any, batch: Any) -> None:
        """After the backward of an example: what metrics need of it."""

    def mean(self, total: float, divisor: float) -> float:
        """The step's loss from its sum over all ranks."""
        return total * (1.0 / max(1.0, divisor))

    def after_step(self, step: int) -> None:
        """The line of step `step` (from 1) is written. Also after a step that was skipped."""

    def saved(self, step: int) -> None:
        """A checkpoint of this step is being written, its tensors are copied."""

    # ------------------------------------------------------------ words and figures

    def values(self, ran: bool) -> dict[str, Any]:
        """The objective's own fields of the step's line, over the common ones. Every rank calls it. `ran` is False where
        the step was left out, or ended before its optimizer step for a loss that is not finite."""
        return {}

    def pack_of(self, example: Any) -> PackedExample | None:
        """The example as a pack of the data path, if it is one: for FLOPs, and for words about memory."""
        return None

    def names(self, example: Any) -> list[str]:
        """Ids of the samples in it."""
        pack = self.pack_of(example)
        return list(pack.sample_ids) if pack is not None else []

    def why_nothing_trains(self, taken: StepExamples) -> str:
        """Why a step with samples has nothing that weighs."""
        return "no sample of the batch can be read, or none of them is supervised"

    # ------------------------------------------------------------ checkpoints

    def state(self) -> Iterable[tuple[str, torch.Tensor]]:
        """(name, whole tensor) of the objective's own state. Every rank calls it; checkpoints keep rank 0's tensors whole."""
        return ()

    def load(self, source: Callable[[str], torch.Tensor]) -> None:
        """Take the tensors of `state` back from a checkpoint, by name. Called after `begin`."""


OpenObjective = Callable[[Opening], Objective]
