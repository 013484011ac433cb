"""`terrace export MODEL OUT`: a stage's `final/` as a directory of its own, in another number format where one is wanted.

What `final/` holds is what transformers, vLLM and the converters of other formats read; those converters are not copied here, and
formats that only they write are refused with the command that does it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terrace.errors import InputError

if TYPE_CHECKING:
    import torch

ELSEWHERE = {
    "gguf": "GGUF is written by llama.cpp's own converter, from what `--format hf` writes: `python convert_hf_to_gguf.py DIR`",
    "awq": "quantised weights come from vLLM's llm-compressor, with samples of yours, from what `--format hf` writes",
}
ELSEWHERE["gptq"] = ELSEWHERE["awq"]
PRECISIONS = ("fp32", "bf16", "fp16")


def register(subparsers: argparse._SubParsersAction) -> None:
    export = subparsers.add_parser(
        "export",
        help="copy a stage's model out of its run, in another number format if wanted",
        description="Write a model as a Hugging Face directory of its own: weights, config.json, tokenizer, preprocessing, chat template.",
    )
    export.add_argument("model", type=Path, metavar="MODEL", help="a run directory (its newest complete stage), or a model directory")
    export.add_argument("out", type=Path, metavar="OUT", help="new folder for the model")
    export.add_argument("--stage", help="with a run directory: this stage's model")
    export.add_argument(
        "--format", default="hf", metavar="FORMAT",
        help="hf (default), what transformers and vLLM read; for gguf, awq and gptq it says which program writes them from that",
    )  # fmt: skip
    export.add_argument("--precision", choices=PRECISIONS, help="number format of the weights (default: as they are)")
    export.set_defaults(main=export_command)


def export_command(arguments: argparse.Namespace) -> int:
    if arguments.format in ELSEWHERE:
        raise InputError(f"--format {arguments.format}: {ELSEWHERE[arguments.format]}")
    if arguments.format != "hf":
        raise InputError(f"--format {arguments.format}: hf is written here, and {', '.join(ELSEWHERE)} by programs that it names")
    source = chosen_model(arguments.model, arguments.stage)
    if arguments.out.exists():
        raise InputError(f"{arguments.out} is there already; name a new folder")
    if arguments.out.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{arguments.out} lies inside {source}; name a folder elsewhere")
    tensors, size = write_copy(source, arguments.out, arguments.precision)
    print(f"{source} is in {arguments.out}: {tensors:,} tensors, {size / 2**20:,.1f} MiB")
    return 0


def chosen_model(path: Path, stage: str | None) -> Path:
    """The model directory: the path itself, or a stage's `final/` below it. Raises InputError where there is none."""
    from terrace.talk.model_place import model_directory

    if stage is None:
        return model_directory(path)
    found = [folder for folder in sorted(path.glob("stages/*")) if stage in (folder.name, folder.name.partition("-")[2])]
    if not found:
        raise InputError(f"{path}: no stage {stage} among {', '.join(folder.name for folder in sorted(path.glob('stages/*'))) or 'none'}")
    if not (found[-1] / "final" / "config.json").is_file():
        raise InputError(f"{found[-1]} is not complete yet: it has no final/")
    return found[-1] / "final"


def write_copy(source: Path, out: Path, precision: str | None) -> tuple[int, int]:
    """Copy the directory, its floating-point weights in the number format; whole or not at all. Returns tensors and bytes of the weights.

    One file is held at a time. Adapters and heads beside the weights are copied as they are.
    """
    from terrace.models.export import open_work
    from terrace.models.precision import DTYPE_NAMES
    from terrace.models.tensor_writing import save_file

    if not any(source.glob("*.safetensors")):
        raise InputError(f"{source}: no safetensors files; weights of other formats are not opened here")
    work = open_work(out)
    tensors = size = 0
    for file in sorted(source.iterdir()):
        target = work / file.name
        if file.is_dir():
            shutil.copytree(file, target)
        elif file.suffix != ".safetensors":
            shutil.copyfile(file, target)
        else:
            held, metadata = _read(file)
            if precision is not None:
                held = {name: _stored(name, value, precision) for name, value in held.items()}
            save_file(held, target, metadata)
            tensors, size = tensors + len(held), size + sum(value.nbytes for value in held.values())
    if precision is not None:
        config = json.loads((work / "config.json").read_text(encoding="utf-8"))
        (work / "config.json").write_text(json.dumps(_in_format(config, DTYPE_NAMES[precision]), indent=2) + "\n", encoding="utf-8")
        if (index := work / "model.safetensors.index.json").is_file():
            values = json.loads(index.read_text(encoding="utf-8"))
            values.setdefault("metadata", {})["total_size"] = size
            index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    work.rename(out)
    return tensors, size


def _stored(name: str, value: torch.Tensor, precision: str) -> torch.Tensor:
    """The tensor in the number format. Raises InputError where a number has no place in it: fp16 ends at 65,504."""
    from terrace.models.precision import DTYPES

    if not value.is_floating_point():
        return value
    stored = value.to(DTYPES[precision])
    if not bool(stored.isfinite().all()) and bool(value.isfinite().all()):
        raise InputError(f"{name}: its largest number, {float(value.abs().max()):g}, is beyond {precision}; bf16 holds it")
    return stored


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        names = list(opened.keys())
        return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}


def _in_format(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration with the number format wherever it says one, in its parts too."""
    said = {key: name for key in ("dtype", "torch_dtype") if key in config}
    parts = {key: _in_format(value, name) for key, value in config.items() if isinstance(value, dict)}
    return {**config, **parts, **said}
