"""The objectives that a stage may name, and the two files behind each: one entry adds one. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import WrapValidator

from terrace.recipe.schema_views import VIEW_OPTIONS

PACKS = "terrace.train.feed"  # packs of the data path


@dataclass(frozen=True)
class ObjectiveEntry:
    """`module` has `open_objective(opening)` (objectives.interface), `feed` has `open_feed(recipe, stage_index, prepared,
    context)`. Both are imported by the worker that trains a stage, and by nobody else."""

    module: str
    feed: str = PACKS
    refused_kinds: dict[str, str] = field(default_factory=dict)  # kinds of sources that it cannot learn from -> what can
    only_kind: str | None = None  # the one kind of source that it reads
    shares_packs: bool = False  # parallel.sequence_parallel is offered
    needs_targets: bool = False  # samples in which nothing is supervised are left out
    answers: bool = True  # its model answers questions: evaluate.suites are offered
    model: str = "text"  # what its model gives (`families.interface.Family.gives`)
    models: tuple[str, ...] = ()  # all that it trains where there are others, too
    heads: bool = False  # it trains `train.heads`
    views: bool = False  # it compares views of pictures
    fixed_packs: bool = False  # a pack is `batch.samples_per_pack` samples of one picture each, rather than a full sequence
    masks: bool = False  # it masks tokens of texts, other ones in every pass over a source
    counts_rows: bool = False  # `batch.packs` are rows of a source, each a prompt with its answers, rather than full sequences
    balances: bool = False  # it adds the load-balancing loss of a mixture of experts (`expert_balance`)
    figures: tuple[str, ...] = ()  # what it measures of every kind of held-out samples, as `eval/KIND/FIGURE`; none: the loss

    def trains(self, gives: str) -> bool:
        """Whether it trains a model that gives this."""
        return gives in (self.models or (self.model,))

    @property
    def suites(self) -> tuple[str, ...]:
        """Kinds of suites that its model can be asked at the stage's end."""
        asked = ASKED_SUITES if self.answers else ()
        return {"text": asked, "vectors": VECTOR_SUITES, "pictures": PICTURE_SUITES, "matches": (), "tokens": ()}[self.model]

    @property
    def draws_by_pass(self) -> bool:
        """Whether what chance decides of a sample is another in every pass over its source."""
        return self.fixed_packs or self.masks

    @property
    def reads_packs(self) -> bool:
        """Whether its batches are packs that the plan knows before the stage runs."""
        return self.feed == PACKS


ASKED_SUITES = ("mmbench", "grounding", "gui", "counting", "ocr", "chart", "caption", "reasoning", "loss")
PICTURE_SUITES = ("knn", "probe")  # of features of pictures
VECTOR_SUITES = ("zero_shot", "retrieval", *PICTURE_SUITES)
FOR_ANSWERS = {  # kinds without a text to learn -> what learns them
    "preference": "dpo or reward_model", "prompt": "grpo", "picture": "mae, dino, simclr or another objective over pictures",
}  # fmt: skip
RETRIEVAL = ("loss", *(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)))

OBJECTIVES: dict[str, ObjectiveEntry] = {
    "lm": ObjectiveEntry(
        "terrace.objectives.lm",
        refused_kinds=FOR_ANSWERS,
        shares_packs=True,
        needs_targets=True,
        balances=True,
    ),
    "mlm": ObjectiveEntry(
        "terrace.objectives.mlm", refused_kinds=FOR_ANSWERS, answers=False, model="tokens", masks=True, figures=("loss", "accuracy")
    ),
    "grpo": ObjectiveEntry("terrace.rl.objective", "terrace.rl.prompt_feed", balances=True),
    "reward_model": ObjectiveEntry(
        "terrace.objectives.reward_model", "terrace.rl.pair_feed", only_kind="preference", answers=False, counts_rows=True,
        balances=True,
    ),
    **{
        name: ObjectiveEntry(
            f"terrace.objectives.{name}", only_kind="caption", answers=False, model="vectors", fixed_packs=True, figures=RETRIEVAL
        )
        for name in ("clip", "siglip")
    },
    "matching": ObjectiveEntry(
        "terrace.objectives.matching", only_kind="caption", answers=False, model="matches", fixed_packs=True, figures=RETRIEVAL
    ),
    "mae": ObjectiveEntry(
        "terrace.objectives.mae", answers=False, model="pictures", fixed_packs=True, views=True, figures=("loss",)
    ),
    **{
        name: ObjectiveEntry(
            f"terrace.objectives.{name}", refused_kinds=FOR_ANSWERS, needs_targets=True, heads=True, balances=True
        )
        for name in ("mtp", "medusa")
    },
    **{
        name: ObjectiveEntry(
            f"terrace.objectives.{name}", answers=False, model="pictures", models=("pictures", "vectors"), heads=True, views=True,
            fixed_packs=True, figures=("spread",) if name == "instance_discrimination" else ("loss", "spread"),
        )
        for name in VIEW_OPTIONS
    },
    **{
        name: ObjectiveEntry(
            f"terrace.objectives.{name}", "terrace.rl.answer_feed", only_kind="preference", balances=True, counts_rows=True
        )
        for name in ("dpo", "mpo", "kto", "orpo", "simpo")
    },
}
# Sections of a stage that only the objective of that name reads.
OPTIONS = ("grpo", "mlm", "matching", "mtp", "medusa", "dpo", "mpo", "kto", "orpo", "simpo", *VIEW_OPTIONS)


def _known(value: Any, validate: Any) -> Any:
    """One of the list below, or one that was added to the table since it was made (an extension, a test)."""
    return value if isinstance(value, str) and value in OBJECTIVES else validate(value)


ObjectiveName = Annotated[Literal[tuple(OBJECTIVES)], WrapValidator(_known)]  # type: ignore[valid-type]
