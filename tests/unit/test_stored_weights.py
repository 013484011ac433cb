"""Starting weights on S3: the same tensors as from a folder, whole or by part, and only what is asked for crosses the network."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packs import tiny_model
from stored_run import BUCKET, Machines, machines_and_bucket

from terrace.errors import InputError
from terrace.models.build import build_model, meta_model, model_config
from terrace.models.tensor_files import HEADER_BYTES, Directory
from terrace.models.weights import initial_weights
from terrace.recipe.schema import Model
from terrace.storage.conditional import swap
from terrace.storage.s3 import s3

SHAPE = tiny_model()["config"]
URI = f"s3://{BUCKET}/models/tiny"


def described(**changes) -> Model:
    return Model.model_validate({"config": SHAPE, **changes})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """(folder, server): a model in several shards, in a folder and below URI."""
    folder = tmp_path_factory.mktemp("saved")
    build_model(described(seed=5), model_config(described())).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    with machines_and_bucket(folder) as machines:
        for path in folder.glob("*.*"):
            s3().put_file(str(path), f"{URI}/{path.name}")
        yield folder, machines


def test_the_same_tensors_as_from_the_folder(saved: tuple[Path, Machines]):
    folder, _ = saved
    local, stored = Directory(folder), Directory(URI)
    assert stored.names == local.names
    assert all(stored.shape(name) == local.shape(name) for name in local.names)
    assert all(torch.equal(stored.read(name), local.read(name)) for name in local.names)


def test_only_what_is_asked_for_is_read(saved: tuple[Path, Machines]):
    machines = saved[1]
    stored = Directory(URI)
    name = "model.language_model.embed_tokens.weight"
    machines.server.requests.clear()
    tensor = stored.read(name)
    [(method, _, span)] = machines.server.requests
    first, last = map(int, span.removeprefix("bytes=").split("-"))
    assert (method, last - first + 1) == ("GET", tensor.numel() * tensor.element_size())


def test_a_model_starts_whole_or_by_part(saved: tuple[Path, Machines]):
    config = model_config(described(config=None, pretrained=URI))
    assert config.vision_config.hidden_size == 32
    whole = dict(build_model(described(config=None, pretrained=URI), config).named_parameters())
    reference = dict(build_model(described(seed=5), model_config(described())).named_parameters())
    assert all(torch.equal(whole[name], parameter) for name, parameter in reference.items())
    part = dict(build_model(described(init={"vision": URI}), model_config(described())).named_parameters())
    vision = "model.visual.blocks.0.attn.qkv.weight"
    language = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(part[vision], reference[vision])
    assert not torch.equal(part[language], reference[language]), "the other parts stay random, from seed 0"


def test_another_rope_base_is_said(saved: tuple[Path, Machines], caplog: pytest.LogCaptureFixture):
    shape = json.loads(json.dumps(SHAPE))
    shape["text_config"]["rope_parameters"]["rope_theta"] = 640000.0
    model = described(config=shape, init={"language": URI})
    with caplog.at_level(logging.WARNING):
        _, report = initial_weights(model, meta_model(model_config(model)))
    assert report.notes == [f"the language weights of {URI} have RoPE base 10000, the model has 640000"]
    assert report.notes[0] in caplog.text


def test_what_is_wrong_is_named(saved: tuple[Path, Machines]):
    folder, _ = saved
    with pytest.raises(InputError, match=rf"{URI}-none: no \*.safetensors"):
        Directory(f"{URI}-none")
    with pytest.raises(InputError, match=r"no config\.json"):
        model_config(described(config=None, pretrained=f"{URI}-none"))
    shard = min(path.name for path in folder.glob("*.safetensors"))
    whole = (folder / shard).read_bytes()
    s3().pipe_file(f"{URI}-torn/{shard}", whole[:-10])
    torn = Directory(f"{URI}-torn")
    with pytest.raises(InputError, match=f"{shard} ends inside"):
        all(torn.read(name) is not None for name in torn.names)
    s3().pipe_file(f"{URI}-html/model.safetensors", b"<html>not found</html>")
    with pytest.raises(InputError, match="is no safetensors file"):
        Directory(f"{URI}-html")
    s3().pipe_file(f"{URI}-part/{shard}", whole)
    s3().put_file(str(folder / "model.safetensors.index.json"), f"{URI}-part/model.safetensors.index.json")
    with pytest.raises(InputError, match="the index names"):
        Directory(f"{URI}-part")


def test_a_header_longer_than_the_first_request_is_read_whole(saved: tuple[Path, Machines]):
    folder, _ = saved
    shard = min(path for path in folder.glob("*.safetensors"))
    whole = shard.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    padded = whole[8 : 8 + length] + b" " * (HEADER_BYTES + 8 - length)
    swap(f"{URI}-long/model.safetensors", lambda _: len(padded).to_bytes(8, "little") + padded + whole[8 + length :])
    long, short = Directory(f"{URI}-long"), Directory(URI)
    assert long.names
    assert all(torch.equal(long.read(name), short.read(name)) for name in long.names)
