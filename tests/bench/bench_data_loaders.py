"""One contestant of `bench_data.py` in a process of its own: `python bench_data_loaders.py NAME ROOT --epochs N`.

Each loader is a function from the number of epochs to an iterator of (samples, tensors) as they arrive in this process. Everyone
decodes with the same functions (`terrace.data.images`: libjpeg-turbo, antialiased uint8 resize), cuts the same patches, encodes with
the same tokenizer, packs to 8,192 tokens and hands out uint8 and int32 tensors, so what differs is the way there. Only `processor` is
what people write first: Pillow, the Hugging Face image processor and tokenizer, padded batches.

Everyone delivers `--epochs` and one more in one go, as a long stage would. The process says START when the first epoch is there (Ray,
workers and imports are up) and END at the end, and waits after each for a line on stdin, while the parent reads the CPU seconds of
the whole process tree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from terrace.families.qwen2_5_vl import Qwen25VL

FAMILY = Qwen25VL()

PIXELS = (3_136, 448 * 448)
SEQUENCE_LENGTH = 8_192
Delivered = Iterator[tuple[int, Any]]
Loader = Callable[[int], Delivered]


# ---------------------------------------------------------------- what everyone does with a sample


def encode(data: bytes, text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [L] token ids, uint8 [P, 588] patches) of one sample."""
    from terrace.data.images import image_size, load_pixels

    view, marks = FAMILY.view(*image_size(data), PIXELS), tokenizer.marks(FAMILY)
    pads = [marks["image"]] * view.tokens
    ids = [marks["vision_start"], *pads, marks["vision_end"], *tokenizer.encode(text), marks["end_of_text"]]
    return np.asarray(ids, np.int32), load_pixels(data, FAMILY, view)


def packed(samples: Iterator[tuple[bytes, str]], tokenizer_dir: str) -> Delivered:
    """Packs of whole samples in their order, as tensors. A pack is closed by the first sample that does not fit."""
    import torch

    from terrace.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir)
    ids: list[np.ndarray] = []
    patches: list[np.ndarray] = []

    def pack() -> tuple[int, Any]:
        ends = np.cumsum([len(part) for part in ids], dtype=np.int32)
        arrays = {"input_ids": np.concatenate(ids), "patches": np.concatenate(patches), "segment_ends": ends}
        return len(ids), {name: torch.from_numpy(array) for name, array in arrays.items()}

    for data, text in samples:
        new_ids, new_patches = encode(data, text, tokenizer)
        if ids and sum(map(len, ids)) + len(new_ids) > SEQUENCE_LENGTH:
            yield pack()
            ids, patches = [], []
        ids.append(new_ids)
        patches.append(new_patches)
    if ids:
        yield pack()


# ---------------------------------------------------------------- contestants


def bare(root: Path, args: argparse.Namespace) -> Loader:
    """Decode, resize, patch and tokenise in a plain loop, over bytes in memory, on every core at once: what nobody can beat.

    All cores, because two hyperthreads of one core are slower together than one of them alone, and every loader keeps both busy.
    """
    import multiprocessing

    pool = multiprocessing.get_context("spawn").Pool(args.workers, initializer=_prepare_bare, initargs=(root,))

    def load(epochs: int) -> Delivered:
        for _ in range(epochs):
            for count in pool.imap(_loop_bare, range(args.workers), chunksize=1):
                yield count, None

    return load


def bare_alone(root: Path, args: argparse.Namespace) -> Loader:
    """The same loop in one process, the other cores idle."""
    _prepare_bare(root)

    def load(epochs: int) -> Delivered:
        for _ in range(epochs):
            yield _loop_bare(0), None

    return load


def _prepare_bare(root: Path) -> None:
    import torch
    from bench_data_corpus import tar_samples

    from terrace.data.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    _BARE.extend([list(tar_samples(root)), load_tokenizer(root / "tokenizer")])


def _loop_bare(_worker: int) -> int:
    samples, tokenizer = _BARE
    for data, text in samples:
        encode(data, text, tokenizer)
    return len(samples)


_BARE: list[Any] = []  # samples and tokenizer of a process


def terrace(root: Path, args: argparse.Namespace) -> Loader:
    """The product: a stage's plan and its own `open_stream`, through Ray Data."""
    import logging

    import ray
    import torch

    from terrace.cluster.fork_server import called_python, python_of_workers
    from terrace.curriculum.attempt_worker import modules_of
    from terrace.data.order.plan import StagePlan
    from terrace.data.stream.rank_stream import open_stream

    recipe, prepared = terrace_data(root)
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (with Ray's 15 it gives way to everything else on the machine; others do not)
    with called_python(python_of_workers(modules_of(recipe))):  # as the command starts it
        ray.init(
            address="local", num_cpus=args.workers, include_dashboard=False, object_store_memory=2**30, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip

    def load(epochs: int) -> Delivered:
        stage = recipe.stages[0]
        budget = stage.budget.model_copy(update={"epochs": float(epochs)})
        resources = stage.resources.model_copy(update={"decode_cpus": args.workers})
        changed = recipe.model_copy(update={"stages": [stage.model_copy(update={"budget": budget, "resources": resources})]})
        for step in open_stream(StagePlan.build(changed, 0, prepared), prepared, 0, 1):
            for pack in step.packs:
                arrays = (pack.input_ids, pack.targets, pack.position_ids, pack.segment_ends, pack.pixels, pack.image_facts)
                yield len(pack.sample_ids), [torch.from_numpy(array) for array in arrays]

    return load


def terrace_data(root: Path) -> tuple[Any, Any]:
    """(recipe, prepared data) of one stage over the corpus's tars, indexed where they lie; made once."""
    from terrace.data.prepare import prepare_data
    from terrace.recipe.schema import Recipe

    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "model": {"config": {}},
            "tokenizer": {"path": str(root / "tokenizer")},
            "data": {"sources": {"captions": {"uri": str(root / "tars")}}},
            "stages": [
                {
                    "name": "one", "train": {"projector": {"lr": 1e-3}}, "mixture": {"weights": {"captions": 1.0}},
                    "sequence_length": SEQUENCE_LENGTH, "pixels": {"min": PIXELS[0], "max": PIXELS[1]}, "budget": {"epochs": 1},
                    "batch": {"packs": 4},
                }
            ],
        }
    )  # fmt: skip
    return recipe, prepare_data(recipe, root / "terrace", use_ray=False)


def webdataset(root: Path, args: argparse.Namespace) -> Loader:
    """WebDataset 1.0: shards split over workers, a shuffle buffer of undecoded samples, packs made in the workers."""
    import webdataset as wds

    shards = sorted(str(path) for path in (root / "tars").glob("*.tar"))
    dataset = wds.WebDataset(shards, shardshuffle=len(shards), workersplitter=wds.split_by_worker).shuffle(500)
    pairs = dataset.map(_pair_of_webdataset).compose(partial(packed, tokenizer_dir=str(root / "tokenizer")))
    return _torch_loader(pairs, args)


def _pair_of_webdataset(sample: dict[str, Any]) -> tuple[bytes, str]:
    return sample["jpg"], sample["txt"].decode()


def hf_datasets(root: Path, args: argparse.Namespace) -> Loader:
    """Hugging Face datasets: Arrow files without decoding, as a sharded iterable with a shuffle buffer, packs in the workers."""
    from torch.utils.data import IterableDataset

    files = sorted(str(path) for path in (root / "parquet").glob("*.parquet"))
    rows = _parquet_rows(root, files).to_iterable_dataset(num_shards=len(files)).shuffle(seed=0, buffer_size=500)

    class Packs(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return packed(((row["image"]["bytes"], row["text"]) for row in rows), str(root / "tokenizer"))

    return _torch_loader(Packs(), args)


def _parquet_rows(root: Path, files: list[str]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(root / "hf-cache"))
    return rows.cast_column("image", datasets.Image(decode=False))


def mosaic(root: Path, args: argparse.Namespace) -> Loader:
    """MosaicML Streaming: MDS shards, its own seeded order, packs in the workers."""
    from bench_data_corpus import tar_samples

    allow_torchvision()
    from streaming import MDSWriter, StreamingDataset

    if not (root / "mds" / "index.json").is_file():
        with MDSWriter(out=str(root / "mds"), columns={"jpg": "bytes", "txt": "str"}, size_limit=2**25) as writer:
            for data, text in tar_samples(root):
                writer.write({"jpg": data, "txt": text})
    plain = StreamingDataset(local=str(root / "mds"), shuffle=True, batch_size=32, shuffle_seed=0)
    from torch.utils.data import IterableDataset

    class Packs(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return packed(((row["jpg"], row["txt"]) for row in plain), str(root / "tokenizer"))

    return _torch_loader(Packs(), args)


def _torch_loader(packs: Any, args: argparse.Namespace) -> Loader:
    """A DataLoader over ready packs: as many workers as cores, kept between epochs."""
    from torch.utils.data import DataLoader

    loader = DataLoader(packs, batch_size=None, num_workers=args.workers, prefetch_factor=4, persistent_workers=True)

    def load(epochs: int) -> Delivered:
        for _ in range(epochs):
            yield from loader

    return load


def allow_torchvision() -> None:
    """Lets a torchvision that was built for CUDA be imported beside a CPU build of torch; nothing here calls these operators."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor x) -> Tensor")
    library.define("qnms(Tensor x) -> Tensor")
    _LIBRARIES.append(library)  # its definitions last as long as it does


_LIBRARIES: list[Any] = []


def processor(root: Path, args: argparse.Namespace) -> Loader:
    """The usual way: decoded by `datasets`, `Qwen2VLImageProcessor` and the tokenizer on batches of 8, float32, padded."""
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerFast

    if args.torchvision:
        sys.path.append(args.torchvision)
        allow_torchvision()
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as ImageProcessor
    else:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as ImageProcessor
    import datasets

    images = ImageProcessor(min_pixels=PIXELS[0], max_pixels=PIXELS[1])
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(root / "tokenizer" / "tokenizer.json"), pad_token="<|endoftext|>")
    files = sorted(str(path) for path in (root / "parquet").glob("*.parquet"))
    rows = _parquet_rows(root, files).cast_column("image", datasets.Image())

    def together(batch: list[dict[str, Any]]) -> Any:
        made = images(images=[row["image"].convert("RGB") for row in batch], return_tensors="pt")
        texts = []
        for row, grid in zip(batch, made["image_grid_thw"].tolist()):
            pads = "<|image_pad|>" * (grid[1] * grid[2] // 4)
            texts.append(f"<|vision_start|>{pads}<|vision_end|>{row['text']}<|endoftext|>")
        return len(batch), dict(made) | dict(tokenizer(texts, padding=True, return_tensors="pt"))

    loader = DataLoader(rows, batch_size=8, shuffle=True, num_workers=args.workers, collate_fn=together, persistent_workers=True)

    def load(epochs: int) -> Delivered:
        for _ in range(epochs):
            yield from loader

    return load


LOADERS = {
    "bare_alone": bare_alone, "bare": bare, "terrace": terrace, "webdataset": webdataset, "datasets": hf_datasets, "mosaic": mosaic,
    "processor": processor,
}  # fmt: skip


# ---------------------------------------------------------------- one run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(LOADERS))
    parser.add_argument("root", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--torchvision", help="folder that holds torchvision, for the Hugging Face processor")
    args = parser.parse_args()
    begun = time.perf_counter()
    load = LOADERS[args.name](args.root, args)
    made = time.perf_counter()
    stream, epoch = load(args.epochs + 1), samples_of(args)
    count, _tensors = next(stream)
    first = time.perf_counter() - made
    while count < epoch:
        count += next(stream)[0]
    facts = {"first_seconds": first, "warm_up_seconds": time.perf_counter() - begun}
    _mark("START")
    begun, samples = time.perf_counter(), 0
    for delivered, _tensors in stream:
        samples += delivered
    facts |= {"samples": samples, "seconds": time.perf_counter() - begun}
    if count + samples != (args.epochs + 1) * epoch:
        raise SystemExit(f"{args.name} delivered {count + samples} samples in {args.epochs + 1} epochs of {epoch}")
    _mark("END " + json.dumps(facts))
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    os._exit(0)  # loaders with threads of their own take seconds to say goodbye


def samples_of(args: argparse.Namespace) -> int:
    """Samples of an epoch; every process of `bare` takes them all."""
    from bench_data_corpus import tar_samples

    return sum(1 for _ in tar_samples(args.root)) * (args.workers if args.name == "bare" else 1)


def _mark(what: str) -> None:
    print(what, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
