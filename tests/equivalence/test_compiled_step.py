"""The compiled decoding step against the plain one: the same answers, in every state of a batch, and only where it can be had."""

from __future__ import annotations

import logging
import subprocess

import numpy as np
import pytest
import torch
from vllm_world import World, mismatch, said, world_of

from terrace.generation.interface import Sampling
from terrace.generation.native import NativeEngine
from terrace.models import native_code
from terrace.models.compiled_step import CompiledStep
from terrace.models.families.registry import family_of_model

SAMPLING = Sampling(samples=3, max_tokens=20, seed=4)
PLACES = Sampling(samples=4, max_tokens=70, seed=3, temperature=0.7)  # answers of more tokens than a cache has room for at first


@pytest.fixture(autouse=True)
def _one_thread_and_a_cache_of_its_own(tmp_path_factory, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "compiled"))  # of all tests here


def engine_of(world: World, model, compiled: bool = True, rows: int = 256) -> NativeEngine:
    return NativeEngine(model, world.never, world.stop, "cpu", "fp32", rows, compiled)


def with_windows(model) -> None:
    """One layer sees less than a prompt back, one less than an answer."""
    for layer, window in zip(family_of_model(model).language(model).layers, (30, 3)):
        layer.self_attn.sliding_window = window


SLOW = [
    pytest.param(name, windows, marks=pytest.mark.slow)
    for name, windows in (("qwen2_5_vl", True), ("qwen3_vl", False), ("qwen2_vl", False), ("llava", False))
]


@pytest.mark.parametrize(("name", "windows"), [("qwen2_5_vl", False), ("qwen3_vl", True), *SLOW])
def test_it_says_what_the_plain_step_says(name, windows, tmp_path, monkeypatch):
    world = world_of(name, tmp_path)
    model = world.model(1)
    if windows:
        with_windows(model)
    used = []
    logits_of = CompiledStep.logits_of
    monkeypatch.setattr(CompiledStep, "logits_of", lambda *args: used.append(len(args[1])) or logits_of(*args))
    # Few rows: sequences begin in places that others leave, so lengths differ, rows stand idle, and prompts come and go.
    for sampling, rows in ((SAMPLING, 256), (PLACES, 6)):
        used.clear()
        compiled = engine_of(world, model, rows=rows).generate(world.prompts, sampling)
        assert used
        plain = engine_of(world, model, False, rows).generate(world.prompts, sampling)
        assert said(compiled) == said(plain)
        for one, other in zip(compiled, plain, strict=True):
            assert max(np.abs(a.logprobs - b.logprobs).max() for a, b in zip(one, other)) < 3e-5
    again = engine_of(world, model, rows=rows).generate(world.prompts, sampling)
    assert [[one.logprobs.tolist() for one in group] for group in again] == [[one.logprobs.tolist() for one in group] for group in compiled]
    if not windows:
        assert mismatch(world, model, compiled, sampling) < 1e-4


def test_weights_that_move_are_read_where_they_are(tmp_path):
    world = world_of("qwen2_5_vl", tmp_path)
    model, other = world.model(1), world.model(2)
    engine = engine_of(world, model)
    first = engine.generate(world.prompts, SAMPLING)
    for parameter, new in zip(model.parameters(), other.parameters()):
        parameter.data = new.data.clone()
    second = engine.generate(world.prompts, SAMPLING)
    assert said(second) != said(first)
    assert said(second) == said(engine_of(world, other).generate(world.prompts, SAMPLING))


@pytest.mark.parametrize(("what", "told"), [
    ("no compiler", "no C compiler was found"), ("a compiler that fails", "ended with 3: cc: out of order"), ("bf16", "float32 on a CPU"),
    ("autocast", "wants precision fp32, not bf16"), ("another activation", "wants SiLU"), ("an adapter", "without adapters"),
])  # fmt: skip
def test_where_it_cannot_be_had_the_plain_step_decodes_and_the_log_says_why(what, told, tmp_path, monkeypatch, caplog):
    world = world_of("qwen2_5_vl", tmp_path)
    model = world.model(1)
    if what == "bf16":
        model.to(torch.bfloat16)
    elif what == "another activation":
        family_of_model(model).language(model).layers[1].mlp.act_fn = torch.nn.GELU()
    elif what == "an adapter":  # puts something around what a layer's part gives
        family_of_model(model).language(model).layers[1].mlp.register_forward_hook(lambda _module, _inputs, output: output * 1.5)
    elif what != "autocast":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
        folder = tmp_path / "bin"
        folder.mkdir()
        if what != "no compiler":
            (folder / "cc").write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'cc: out of order' >&2\nexit 3\n")
            (folder / "cc").chmod(0o700)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.delenv("CC", raising=False)
    engine = NativeEngine(model, world.never, world.stop, "cpu", "bf16" if what == "autocast" else "fp32", compiled=True)
    with caplog.at_level(logging.WARNING):
        answers = engine.generate(world.prompts[:1], SAMPLING)
        engine.generate(world.prompts[:1], SAMPLING)
    assert len(answers[0]) == 3
    (line,) = [record.getMessage() for record in caplog.records if "decoding steps" in record.getMessage()]
    assert line.startswith("decoding steps are not compiled: ")
    assert told in line


def test_a_library_is_compiled_once_and_by_whoever_runs_it(tmp_path, monkeypatch):
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return NUMBER; }\n")
    runs = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **rest: runs.append(command) or run(command, **rest))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def compilations() -> int:
        return sum("--version" not in command for command in runs)

    assert native_code.compiled(source, {"NUMBER": 42}).answer() == 42
    assert native_code.compiled(source, {"NUMBER": 42}).answer() == 42
    assert compilations() == 1
    assert native_code.compiled(source, {"NUMBER": 7}).answer() == 7
    monkeypatch.setattr(native_code, "_processor", lambda: b"another")  # a home folder that machines share
    assert native_code.compiled(source, {"NUMBER": 7}).answer() == 7
    assert compilations() == 3
    monkeypatch.setattr(native_code, "_ours", lambda path: False)
    assert native_code.compiled(source, {"NUMBER": 7}).answer() == 7
    assert compilations() == 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # not a folder
    assert native_code.compiled(source, {"NUMBER": 8}).answer() == 8
    source.write_text("int answer(void) { return ; }\n#error no\n")
    with pytest.raises(native_code.NotCompiled, match="ended with 1: "):
        native_code.compiled(source, {})
