"""The prompts of an iteration: drawn in the data plane's order, read from their shards, encoded as training encodes.

Draw n of the stage is the n-th sample of the mixture's interleave, or a prompt of the easy pool. The position (an
integer) and the pool are the whole state, so the order is the same after a restart and for any number of workers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from terrace.data.order.eligible import source_pixels
from terrace.data.order.permutation import source_rows
from terrace.data.order.plan import StagePlan
from terrace.data.prompt import measured_prompt, read_prompt
from terrace.data.stream.read import read_located
from terrace.data.tokenizer import TextTokenizer
from terrace.data.types import Sample
from terrace.errors import DamagedData, InputError
from terrace.families.interface import Bounds
from terrace.generation.interface import Prompt
from terrace.recipe.schema import Recipe
from terrace.recipe.schema_grpo import GrpoOptions
from terrace.rewards.ready import Prompt as Judged
from terrace.rewards.registry import load_reward, place_of
from terrace.rl.environments import Sights
from terrace.rl.pairs import Pair, answer_tokens, text_of_items
from terrace.rl.pools import EasyPool

log = logging.getLogger(__name__)

DRAWN_AT_ONCE = 64
READ_THREADS = 4


@dataclass(frozen=True)
class Drawn:
    """One prompt of an iteration, by reference."""

    key: tuple[str, int]  # (source, row)
    occurrence: int  # draws of the same prompt before this one in the iteration


class PromptOrder:
    """Position -> prompt. `position` counts samples of the interleave that were used or passed over."""

    def __init__(
        self,
        recipe: Recipe,
        stage_index: int,
        prepared: Any,
        draws_per_step: int | None = None,
        reserved_tokens: int | None = None,
    ) -> None:
        """`draws_per_step` and `reserved_tokens` (of the sequence, for the response) default to the grpo options'."""
        stage = recipe.stages[stage_index]
        options = stage.grpo or GrpoOptions()
        reserved = stage.longest_conversation if reserved_tokens is None else reserved_tokens
        per_step = options.prompts_per_iteration if draws_per_step is None else draws_per_step
        room = stage.sequence_length - reserved
        if room < 16:
            raise InputError(
                f"stage {stage.name}: sequence_length {stage.sequence_length} leaves {room} tokens for a prompt beside the {reserved} of "
                f"{'the longest conversation' if stage.environment else 'max_response_tokens'}"
            )
        stages = [one.model_copy(update={"sequence_length": room}) for one in recipe.stages]
        self._plan = StagePlan.build(recipe.model_copy(update={"stages": stages}), stage_index, prepared)
        self._seed = stage.seed
        self.pool = EasyPool(options.easy_pool_probability, options.drop_pass_rate_above)
        self.position = 0
        self.draws = 0
        self._settled: tuple[int, int] | None = None
        self._ahead: list[tuple[int, tuple[str, int]]] = []
        self._rows: dict[str, np.ndarray] = {}
        budget = stage.budget
        if budget.steps is not None:
            self.iterations = -(-budget.steps // options.updates_per_rollout)
        elif budget.samples is not None or budget.epochs is not None:
            samples = budget.samples or self._plan.interleave.total or 0
            self.iterations = max(1, -(-samples // per_step))
        else:
            raise InputError(
                f"stage {stage.name}: the budget of objective {stage.objective} is steps, samples (prompts) or epochs"
            )
        self.fingerprint = self._plan.fingerprint

    def may_draw(self) -> list[tuple[str, int]]:
        """(source, row) of every prompt that training may draw, in the order of the mixture's sources and their rows."""
        return [(source.name, int(row)) for source in self._plan.sources for row in np.unique(source.items.rows)]

    def following(self, key: tuple[str, int]) -> tuple[str, int] | None:
        """The next row of the same source that training may draw, after the last one the first. None: there is no other."""
        if key[0] not in self._rows:
            self._rows |= {source.name: np.unique(source.items.rows) for source in self._plan.sources}
        rows = self._rows.get(key[0], np.zeros(0, np.int64))
        place = int(np.searchsorted(rows, key[1], side="right")) % max(1, len(rows))
        return None if not len(rows) or int(rows[place]) == key[1] else (key[0], int(rows[place]))

    def draw(self, count: int, drawn: Counter[tuple[str, int]]) -> list[Drawn]:
        """The next `count` prompts; `drawn` counts those of the iteration and is updated. Fewer when the order ends."""
        found: list[Drawn] = []
        while len(found) < count:
            key = self.pool.pick(self._seed, self.draws)
            if key is None:
                key = self._next_of_order()
            if key is None:
                break
            self.draws += 1
            found.append(Drawn(key, drawn[key]))
            drawn[key] += 1
        return found

    def _next_of_order(self) -> tuple[str, int] | None:
        passed_over = 0
        while True:
            if not self._ahead or self._ahead[0][0] != self.position:
                self._ahead = self._read_ahead()
                if not self._ahead:
                    return None
            _, key = self._ahead.pop(0)
            self.position += 1
            # When the pool holds nearly everything, easy prompts are taken rather than searching for ever.
            if not self.pool.takes_out(key) or passed_over >= 10 * DRAWN_AT_ONCE:
                return key
            passed_over += 1

    def _read_ahead(self) -> list[tuple[int, tuple[str, int]]]:
        plan, start = self._plan, self.position
        sources, draws = plan.interleave.draw(start, start + DRAWN_AT_ONCE)
        keys: list[tuple[str, int]] = [("", -1)] * len(sources)
        for number, source in enumerate(plan.sources):
            here = np.flatnonzero(sources == number)
            if here.size:
                items = source.take(source_rows(draws[here], source.count, plan.seed, source.name))
                for place, row in zip(here.tolist(), items.rows.tolist()):
                    keys[place] = (source.name, row)
        return [(start + place, key) for place, key in enumerate(keys)]

    def mark(self) -> tuple[int, int]:
        """The place in the order, for `rewind` and `settle`."""
        return self.position, self.draws

    def rewind(self, mark: tuple[int, int]) -> None:
        """Draw again from this place on."""
        self.position, self.draws = mark
        self._ahead = []

    def settle(self, mark: tuple[int, int]) -> None:
        """A checkpoint's place from now on is this one: what was drawn after it is not decided."""
        self._settled = mark

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, the same for any number of workers."""
        position, draws = self._settled or self.mark()
        return {"prompts": self.fingerprint, "position": position, "draws": draws, "pool": self.pool.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises InputError if the order is another one by now."""
        if state.get("prompts") != self.fingerprint:
            raise InputError(
                "the checkpoint's order of prompts is not this recipe's: sources, mixture, seed, pixels or lengths changed "
                "since; change them back, or start the stage in a new run directory"
            )
        self.position, self.draws = int(state["position"]), int(state["draws"])
        self.pool.restore(state["pool"])
        self._ahead, self._settled = [], None


class PromptReader:
    """References to prompts: reads, decodes, resizes and encodes with the modules that training uses.

    `unready` names the prompts that are left out when they are drawn, with reasons; `rl.readiness` finds them."""

    def __init__(self, recipe: Recipe, stage_index: int, prepared: Any, tokenizer: TextTokenizer) -> None:
        self._recipe, self._stage, self._prepared = recipe, recipe.stages[stage_index], prepared
        self._tokenizer = tokenizer
        self.unready: dict[tuple[str, int], str] = {}

    def without_unready(self, drawn: Sequence[Drawn]) -> tuple[list[Drawn], list[str]]:
        """The references that can be judged, and which cannot: `source/sample`. The same on every rank."""
        left_out = [one for one in drawn if one.key in self.unready]
        names = [f"{one.key[0]}/{self._prepared.indexes[one.key[0]].location(one.key[1]).id}" for one in left_out]
        if names:
            log.info("prompts that cannot be judged are left out (`on_unready: skip`): %s", ", ".join(names))
        return [one for one in drawn if one.key not in self.unready], names

    @property
    def sights(self) -> Sights:
        """How what comes behind a prompt is seen: as its source's own images."""
        pixels, sources = (self._stage.pixels.min, self._stage.pixels.max), self._recipe.data.sources
        family = self._prepared.family

        def bounds(source: str) -> Bounds:
            return source_pixels(sources[source], pixels, family)

        return Sights(self._tokenizer, family, bounds, self._recipe.data.max_image_pixels)

    def for_judging(self, drawn: Drawn, sample: Sample) -> Judged:
        """What rewards would know of the prompt, without opening an image. Raises InputError where it could not be drawn."""
        _, scales = self._measured(drawn, sample)
        task = self._task(drawn, sample)
        if task and "solution" not in sample.metadata and self._needs_solution(task):
            self._refuse(drawn, sample)
        return Judged(sample.id, task or "", sample.metadata.get("solution"), self._metadata(drawn, sample, scales))

    def read(self, drawn: Sequence[Drawn]) -> list[Any]:
        """Prompts in the order of the references. Raises DamagedData or InputError naming source and sample."""
        return [self._whole(one) for one in self._read(drawn)]

    def read_usable(self, drawn: Sequence[Drawn]) -> tuple[list[tuple[Drawn, Any]], list[str]]:
        """(reference, prompt) of those that can be read, and which could not: `source/sample`. Raises DamagedData for a
        damaged sample of a source that does not say `on_damage: skip`."""
        usable, damaged = [], []
        for one, found in zip(drawn, self._read(drawn)):
            if isinstance(found, DamagedData) and self._recipe.data.sources[one.key[0]].on_damage == "skip":
                log.warning("%s; it is left out (`on_damage: skip`)", found)
                damaged.append(f"{one.key[0]}/{self._prepared.indexes[one.key[0]].location(one.key[1]).id}")
            else:
                usable.append((one, self._whole(found)))
        return usable, damaged

    @staticmethod
    def _whole(found: Any) -> Any:
        if isinstance(found, DamagedData):
            raise found
        return found

    def _read(self, drawn: Sequence[Drawn]) -> list[Any]:
        """For each reference what `_made` makes of its sample, or the damage."""
        if not drawn:
            return []
        results = read_located([self._prepared.indexes[one.key[0]].location(one.key[1]) for one in drawn])

        def made(one: Drawn, result: Any) -> Any:
            if isinstance(result, DamagedData):
                return result
            try:
                return self._made(one, *result)
            except DamagedData as damage:
                return DamagedData(f"source {one.key[0]}, sample {result[0].id}: {damage}")

        with ThreadPoolExecutor(READ_THREADS) as pool:
            return list(pool.map(made, drawn, results))

    def _made(self, drawn: Drawn, sample: Sample, images: list[bytes]) -> Any:
        return self._prompt(drawn, sample, images)

    def _prompt(self, drawn: Drawn, sample: Sample, images: list[bytes]) -> Prompt:
        task = self._task(drawn, sample)
        if task is None or ("solution" not in sample.metadata and self._needs_solution(task)):
            self._refuse(drawn, sample)
        return self._encoded(drawn, sample, images, str(task))

    def _needs_solution(self, task: str) -> bool:
        """Whether a rule of the task reads one: services, reward models and environments may do without, so that the rows that trained a
        reward model are prompts too."""
        rules = [rule.name for rule in self._stage.rewards.get(task, ())]
        return any(place_of(name) == "sandbox" and getattr(load_reward(name), "needs_solution", True) for name in rules)

    def _task(self, drawn: Drawn, sample: Sample) -> str | None:
        return sample.metadata.get("task") or self._recipe.data.sources[drawn.key[0]].task

    @staticmethod
    def _refuse(drawn: Drawn, sample: Sample) -> NoReturn:
        raise InputError(
            f"source {drawn.key[0]}, sample {sample.id}: a prompt of a grpo stage needs `task` and `solution`; "
            "name the source's `task`, or give the row both keys"
        )

    def _sight(self, drawn: Drawn) -> tuple[list[tuple[int, int]], tuple[int, int]]:
        """The sizes of the prompt's images as stored, and the (min, max) pixels that the stage shows of each."""
        name, row = drawn.key
        return self._prepared.indexes[name].sizes(row), self.sights.bounds(name)

    def _measured(self, drawn: Drawn, sample: Sample) -> tuple[Any, dict[int, tuple[int, int]]]:
        sizes, pixels = self._sight(drawn)
        return measured_prompt(sample, sizes, self._tokenizer, self._prepared.family, pixels)

    def _metadata(self, drawn: Drawn, sample: Sample, scales: dict[int, tuple[int, int]]) -> dict[str, Any]:
        """What rewards may know beside the text."""
        return {
            **sample.metadata,
            "messages": sample.messages,
            "image_sizes": [list(size) for size in self._sight(drawn)[0]],
            "model_sizes": [list(scales[number]) for number in sorted(scales)],
        }

    def _encoded(self, drawn: Drawn, sample: Sample, images: list[bytes], task: str) -> Prompt:
        sizes, pixels = self._sight(drawn)
        most = self._recipe.data.max_image_pixels
        try:
            read = read_prompt(sample, images, sizes, self._tokenizer, self._prepared.family, pixels, most)
        except InputError as error:
            raise InputError(f"source {drawn.key[0]}, {error}") from error
        return Prompt(
            **vars(read.inputs),
            key=drawn.key,
            id=sample.id,
            task=task,
            text=prompt_text(sample),
            solution=sample.metadata.get("solution"),
            metadata=self._metadata(drawn, sample, read.scales),
            images=tuple(images),
            occurrence=drawn.occurrence,
        )


class PairReader(PromptReader):
    """References to preference pairs: the prompt, the chosen answer and `metadata.rejected`."""

    def _made(self, drawn: Drawn, sample: Sample, images: list[bytes]) -> Pair:
        return self._pair(drawn, sample, images)

    def _pair(self, drawn: Drawn, sample: Sample, images: list[bytes]) -> Pair:
        rejected, chosen = sample.metadata.get("rejected"), sample.messages[-1]
        if rejected is None or chosen["role"] != "assistant":
            raise InputError(
                f"source {drawn.key[0]}, sample {sample.id}: a preference row needs an assistant's answer and a rejected one; rows with "
                "a `label` are for objective kto"
            )
        return Pair(
            self._encoded(drawn, sample, images, "preference"),
            (self._answer(chosen["content"], sample), self._answer(rejected, sample)),
        )

    def _answer(self, items: Any, sample: Sample) -> np.ndarray:
        return answer_tokens(text_of_items(items, sample.id), self._tokenizer, self._prepared.family)


class LabelledReader(PairReader):
    """References to rows of one answer with `metadata.label`, or to pairs; each with the answer to the next row of its source.

    `following` gives that row: the same one whoever reads, so what is measured with it is measured once."""

    def __init__(
        self, recipe: Recipe, stage_index: int, prepared: Any, tokenizer: TextTokenizer,
        following: Callable[[tuple[str, int]], tuple[str, int] | None],
    ) -> None:  # fmt: skip
        super().__init__(recipe, stage_index, prepared, tokenizer)
        self._following = following

    def _read(self, drawn: Sequence[Drawn]) -> list[Any]:
        found = super()._read(drawn)
        nexts = [self._following(one.key) for one in drawn]
        keys = sorted({key for key in nexts if key is not None})
        read = read_located([self._prepared.indexes[name].location(row) for name, row in keys])
        others = {key: result for key, result in zip(keys, read) if not isinstance(result, DamagedData)}
        return [
            replace(pair, other=self._answer(others[key][0].messages[-1]["content"], others[key][0]))
            if isinstance(pair, Pair) and key in others
            else pair
            for pair, key in zip(found, nexts)
        ]

    def _pair(self, drawn: Drawn, sample: Sample, images: list[bytes]) -> Pair:
        label, answer = sample.metadata.get("label"), sample.messages[-1]
        if label is None:
            return super()._pair(drawn, sample, images)
        if answer["role"] != "assistant":
            raise InputError(f"source {drawn.key[0]}, sample {sample.id}: a row with a `label` needs an assistant's answer")
        prompt = self._encoded(drawn, sample, images, "preference")
        return Pair(prompt, (self._answer(answer["content"], sample),), (bool(label),))


def prompt_text(sample: Sample) -> str:
    """The last user turn as text, images as `<image>`: what rewards and logs show."""
    turn = next((m for m in reversed(sample.messages) if m["role"] != "assistant"), sample.messages[0])
    return "".join(item["text"] if item["type"] == "text" else f"<{item['type']}>" for item in turn["content"])


def held_out(recipe: Recipe, stage_index: int, prepared: Any, per_source: int) -> list[Drawn]:
    """References to the held-out prompts of the stage's sources: at most `per_source` of each, those of lowest row."""
    found = []
    for name in recipe.stages[stage_index].mixture.weights:
        found += [Drawn((name, int(row)), 0) for row in np.asarray(prepared.indexes[name].holdout_rows)[:per_source]]
    return found
