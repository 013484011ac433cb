"""A stage's final weights as a plain Hugging Face directory: config, safetensors in shards, tokenizer, image preprocessing,
chat template and generation settings: what `AutoProcessor`, `pipeline` and servers ask for.

Weights between stages are the float32 masters whatever the stage's precision, so that the next stage starts from exactly
where this one ended; those of the last stage are what users load, in the stage's own precision. `dtype` in config.json says
what they were computed in, and that is what `from_pretrained` and servers load them as. What a published checkpoint
brought beside its weights (its template, its generation settings) stays as it was.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import GenerationConfig

from terrace.data.tokenizer import QUESTION_TOKENIZER, file_for
from terrace.families.configurations import language_config
from terrace.models.build import meta_model
from terrace.models.families.interface import configurations
from terrace.models.families.registry import family_of_model
from terrace.models.tensor_files import INDEX
from terrace.models.tensor_writing import save_file

FILE_BYTES = 4 * 10**9  # of the largest file, but for a tensor that is larger
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")  # where a directory may hold it, in this order
KEPT_FILES = ("generation_config.json", "video_preprocessor_config.json", *TEMPLATE_FILES)  # of the checkpoint that a run starts from


@dataclass(frozen=True)
class ExportFiles:
    """What a final directory has beside its tensors. `dtype` goes into config.json; `kept` are `KEPT_FILES` of the checkpoint that the
    run started from."""

    config: Any
    tokenizer_dir: Path | None = None
    pixels: tuple[int, int] = (3136, 1_003_520)
    dtype: str = "float32"
    kept: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write them into a folder that is there."""
        config, kept = copy.deepcopy(self.config), self.kept
        for sub in configurations(config):
            sub.dtype = self.dtype
        model = meta_model(config)
        config.architectures = [type(model).__name__]
        family = family_of_model(model)
        if family.code:
            config.auto_map = dict(family.code)
        family.exported_config(config).save_pretrained(folder)
        for file in family.code_files():
            shutil.copyfile(file, folder / file.name)
        if family.family.gives == "text":
            GenerationConfig(eos_token_id=language_config(config).eos_token_id, do_sample=False).save_pretrained(folder)
        if pictures := family.family.preprocessor(self.pixels):
            _write_json(folder / "preprocessor_config.json", pictures)
        if processor := family.family.processor():
            _write_json(folder / "processor_config.json", processor)
        if self.tokenizer_dir is not None:
            there = {name: file_for(self.tokenizer_dir, name, family.family.name) for name in {*TOKENIZER_FILES, *TEMPLATE_FILES}}
            for name in TOKENIZER_FILES:
                if there[name].is_file():
                    shutil.copyfile(there[name], folder / name)
            if family.family.reads_questions:  # the class's processor wants a tokenizer of its own for them
                questions = self.tokenizer_dir / QUESTION_TOKENIZER
                copied = shutil.ignore_patterns(QUESTION_TOKENIZER)
                shutil.copytree(questions if questions.is_dir() else self.tokenizer_dir, folder / QUESTION_TOKENIZER, ignore=copied)
            own = {name: there[name].read_bytes() for name in TEMPLATE_FILES if there[name].is_file()}
            if template := chat_template(kept) or chat_template(own) or family.family.chat_template:
                (folder / "chat_template.jinja").write_text(template)
        for name in ("generation_config.json", "video_preprocessor_config.json"):
            if name in kept:
                (folder / name).write_bytes(kept[name])


class TensorPlan:
    """Which tensors lie in which file of a final directory, from their shapes alone: all ranks come to the same.

    A file has whole tensors, as every loader wants them. `stored` is the number format of the files.
    """

    def __init__(
        self, config: Any, shapes: Mapping[str, Sequence[int]], stored: torch.dtype = torch.float32, most_bytes: int = FILE_BYTES
    ) -> None:
        """Raises ValueError if the shapes' names are not exactly those of the model."""
        model = meta_model(config)
        expected = {name for name, _ in model.named_parameters()}
        if expected != set(shapes):
            raise ValueError(f"export: tensors differ from the model's: {sorted(expected ^ set(shapes))[:8]}")
        self._family, self._stored = family_of_model(model), stored
        pieces = {name: self._published(name, torch.empty(tuple(shape), device="meta")) for name, shape in shapes.items()}
        sizes = {name: sum(piece.numel() * piece.element_size() for piece in own.values()) for name, own in pieces.items()}
        split = split_torch_state_dict_into_shards(
            {name: torch.empty(size, dtype=torch.uint8, device="meta") for name, size in sizes.items()}, max_shard_size=most_bytes
        )
        self.files: dict[str, list[str]] = split.filename_to_tensors  # by the names of parameters
        self.index: dict[str, Any] | None = None
        if split.is_sharded:
            places = {published: file for name, file in split.tensor_to_filename.items() for published in pieces[name]}
            self.index = {"metadata": split.metadata, "weight_map": places}

    def write_file(self, folder: Path, file: str, published: Mapping[str, torch.Tensor]) -> None:
        """Write one file from what `pieces` gave of its tensors."""
        save_file(published, folder / file, {"format": "pt"})

    def pieces(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A tensor as its file has it: under the name, and in the order of axes, in which the family is published."""
        return self._published(name, tensor)

    def write_index(self, folder: Path) -> None:
        """The index, where there are several files."""
        if self.index is not None:
            (folder / INDEX).write_text(json.dumps(self.index, indent=2))

    def _published(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {published: piece.to(self._stored).contiguous() for published, piece in self._family.stored(name, tensor).items()}


def export_hf(
    state: Mapping[str, torch.Tensor], config: Any, tokenizer_dir: Path | None, out_dir: Path,
    pixels: tuple[int, int] = (3136, 1_003_520), dtype: str = "float32", stored: torch.dtype = torch.float32,
    kept: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a Hugging Face directory (`out_dir` must not exist) from full tensors by parameter name. Returns `out_dir`.

    `dtype` goes into config.json, `stored` is what the files hold; `kept` are `KEPT_FILES` of the checkpoint that the run
    started from. The directory appears under its name only when it is complete.
    """
    work = open_work(out_dir)
    ExportFiles(config, tokenizer_dir, pixels, dtype, kept or {}).write(work)
    plan = TensorPlan(config, {name: tensor.shape for name, tensor in state.items()}, stored)
    for file, names in plan.files.items():
        plan.write_file(work, file, {key: piece for name in names for key, piece in plan.pieces(name, state[name].cpu()).items()})
    plan.write_index(work)
    return finish_work(work, out_dir)


def open_work(out_dir: Path) -> Path:
    """An empty folder in which a directory is made."""
    work = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def finish_work(work: Path, out_dir: Path) -> Path:
    """Give a directory its name: it is complete."""
    for file in work.iterdir():
        file.chmod(0o644)
    shutil.rmtree(out_dir, ignore_errors=True)
    work.rename(out_dir)
    return out_dir


def chat_template(files: Mapping[str, bytes]) -> str:
    """The Jinja template that a directory's `TEMPLATE_FILES` hold, in whichever of the forms that were published; empty: none."""
    for name in TEMPLATE_FILES:
        if name not in files:
            continue
        if name.endswith(".jinja"):
            return files[name].decode("utf-8")
        found = json.loads(files[name]).get("chat_template")
        if isinstance(found, list):  # several by name, as tokenizer_config.json may hold them
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
        if found:
            return str(found)
    return ""


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
