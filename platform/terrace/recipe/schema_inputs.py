"""What goes into a curriculum: the sources, the tokenizer and how samples are mixed. Part of the schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PartName = Literal["vision", "projector", "language"]
PARTS: tuple[PartName, ...] = ("vision", "projector", "language")

SampleKind = Literal[
    "caption",
    "document",
    "text",
    "ocr",
    "grounding",
    "gui",
    "qa",
    "counting",
    "chart",
    "instruction",
    "reasoning",
    "video",
    "preference",
    "prompt",
    "picture",
]

Name = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Base of every recipe model: unknown keys are refused, values are never silently given another meaning."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


# ---------------------------------------------------------------- data


class Storage(Strict):
    """How `s3://` URIs are reached. Credentials come from the usual AWS chain, never from the recipe."""

    endpoint_url: str | None = Field(None, description="S3-compatible endpoint of the data; unset: AWS.")
    region: str | None = Field(None, description="Region of the data's bucket.")
    max_attempts: int = Field(10, ge=1, le=30, description="Tries of one request, with backoff and jitter; 10 outlast half a minute.")
    timeout_seconds: Positive = Field(
        60.0, description="Silence after which a request is given up. In all it may take twice as long, and a second for every 256 KiB."
    )


# Of a source: what one does about samples that stopped a stage. They may change while it is under way and decide no weights before that.
REMEDIES = {"on_damage", "on_unready"}


class Source(Strict):
    """One named set of samples: raw rows that `terrace ingest` turns into shards, or shards indexed in place."""

    uri: str = Field(description="Folder, file, glob or s3:// URI of shards (tar), JSON Lines, Parquet, images or text.")
    kind: SampleKind = Field("caption", description="What the samples are; decides how they are read and which held-out group they join.")
    format: Literal["auto", "webdataset", "jsonl", "json", "csv", "parquet", "image_folder", "text"] = Field(
        "auto", description="Format of the raw rows; `auto` tells it from names and first bytes, and reads all formats that lie there."
    )
    ignore: list[str] = Field(
        [],
        description="Keys of rows and turns (`messages.name`), and suffixes of tar members (`seg.png`), that are left out and counted;"
        " `*` stands for any letters. Any other key that nobody reads refuses its row.",
    )
    exif: Literal["apply", "ignore"] = Field(
        "apply", description="Pictures stand as their EXIF orientation says, and boxes are given for them so; or they stay as stored."
    )
    placeholders: Literal["read", "text"] = Field(
        "read", description="Whether `<image>` and `<video>` in the text of a turn stand for pictures, or are letters."
    )
    special_tokens: Literal["text", "tokens"] = Field(
        "text",
        description="Whether `<|box_start|>` and the like in a text are letters, or the tokenizer's tokens; marks of turns and images stay"
        " letters.",
    )
    datasets: list[str] = Field([], description="Of a LLaMA-Factory `dataset_info.json`: only these entries (none named: all).")
    images_root: str | None = Field(None, description="Folder that image paths in rows are relative to; default: beside the rows.")
    supervise: Literal["auto", "all_text", "assistant"] = Field(
        "auto", description="`auto`: captions and documents on their text, conversations on assistant turns only."
    )
    holdout_samples: int = Field(
        0,
        ge=0,
        description="Samples kept out of training for held-out loss: those with the lowest seeded hashes of what they hold. Where rows are"
        " added later, new ones take some of the places; with `holdout_share` every one stays.",
    )
    holdout_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Instead of a number, the share of samples kept out of training: those below a threshold of the same hash, so that rows"
        " added later move none of them.",
    )
    max_samples: int | None = Field(None, ge=1, description="Cap: only this many samples (a seeded choice) take part.")
    too_long: Literal["refuse", "split", "truncate_text", "reduce_resolution"] = Field(
        "refuse", description="What happens to a sample longer than the stage's sequence: always counted, never silent."
    )
    max_visual_tokens_per_image: int | None = Field(
        None, ge=1, description="Images of this source are resized below this many visual tokens."
    )
    on_damage: Literal["stop", "skip"] = Field("stop", description="Bytes that no longer match the index: stop, or replace.")
    on_unready: Literal["stop", "skip"] = Field(
        "stop",
        description="Prompts of a grpo stage that its rewards cannot judge (no task, no solution, one that its rule cannot read): stop"
        " before the first step, or leave them out and list them in `unready.jsonl`.",
    )
    task: str | None = Field(None, description="Reward task of an RL source.")

    @property
    def holds_out(self) -> bool:
        return self.holdout_samples > 0 or self.holdout_share > 0


class Data(Strict):
    sources: dict[Name, Source] = Field(min_length=1, description="The named sets of samples that mixtures refer to.")
    cache_dir: str | None = Field(None, description="Where ingested shards and indexes lie; default: `<run-dir>/data`.")
    seed: int = Field(0, ge=0, description="Seed of the data order.")
    shard_bytes: int = Field(256 * 2**20, ge=2**16, description="Target size of a shard that ingest writes.")
    max_image_pixels: int = Field(64_000_000, ge=1, description="Images with more pixels are refused at ingest (image bombs).")
    deduplicate: Literal["report", "drop"] = Field(
        "report",
        description="Samples with the same text and pictures as an earlier one, over all sources: counted by `terrace index`, or also left"
        " out of training. What is held out is never trained through another row, either way.",
    )
    storage: Storage = Field(Storage(), description="How s3:// URIs of the data are reached.")


class Tokenizer(Strict):
    """A Hugging Face tokenizer directory (a plain string says this too), or a byte-level BPE trained on the data."""

    path: str | None = Field(None, description="Hugging Face tokenizer directory or s3:// URI.")
    train_vocabulary_size: int | None = Field(
        None, ge=320, le=200_000, description="Train a byte-level BPE of this size on the recipe's own text instead."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


def is_plain_mixture(value: Any) -> bool:
    """Whether a mixture is written as `{source: weight}`: only numbers, or null, which removes a source of the base."""
    if not isinstance(value, dict) or not value or set(value) <= {"temperature"}:
        return False
    return all(weight is None or (isinstance(weight, (int, float)) and not isinstance(weight, bool)) for weight in value.values())


class Mixture(Strict):
    """Written in a recipe as a plain map `{source: weight}`, or in full."""

    weights: dict[Name, Weight] = Field(
        min_length=1, description="Share of each source; normalised. 0: the source waits until one of the stage's `changes` raises it."
    )
    unit: Literal["samples", "tokens"] = Field("samples", description="Whether weights count samples or tokens.")
    temperature: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Weights become weight * size^temperature (0: as written, 1: proportional to size)."
    )
    epoch_caps: dict[Name, Positive] = Field({}, description="At most this many passes over a source in the stage.")

    @model_validator(mode="before")
    @classmethod
    def _from_plain_map(cls, value: Any) -> Any:
        return {"weights": value} if is_plain_mixture(value) else value


class Pixels(Strict):
    """Bounds on the pixels of a resized image; what sizes there are between them, the model family says."""

    min: int = Field(3136, ge=1, description="Smaller images are enlarged to this many pixels.")
    max: int = Field(1_003_520, ge=1, description="Larger images are reduced to this many pixels.")


class Batch(Strict):
    packs: int = Field(8, ge=1, description="Global batch of one optimizer step, in packed sequences, over all workers.")
    samples_per_pack: int = Field(64, ge=1, description="Of objectives whose packs are no sequences: samples that run at once (clip, mae).")
