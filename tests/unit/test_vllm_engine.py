"""The vLLM engine's calls against a stand-in (`fake_vllm`): what Terrace asks of vLLM, in which order, and what it makes of answers.

That vLLM itself answers so is shown by tests/vllm_engine, in an environment that has it.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import fake_vllm
import numpy as np
import psutil
import pytest
import torch
from fake_vllm import STOP

from terrace.errors import InputError, TerraceError
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.generation import vllm as vllm_module
from terrace.generation import vllm_policy as adapter
from terrace.generation.interface import Prompt, Sampling
from terrace.generation.vllm import VllmLost
from terrace.generation.vllm_folder import PREFIX, PrivateFolder, settled_bounds, with_bounds
from terrace.generation.vllm_process import watch
from terrace.recipe.schema import Stage
from terrace.rl.units import TrainGroup
from terrace.rl.update import UpdateFigures
from terrace.worker.context import WorkerContext

PAD, START, END, VOCABULARY = 90, 91, 92, 100
FAMILY = Qwen25VL()
PIXELS = (784, 6272)


@pytest.fixture
def seen(monkeypatch, tmp_path) -> fake_vllm.Seen:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = fake_vllm.install(monkeypatch)

    class Files:
        def __init__(self, config, tokenizer_dir, pixels, dtype):
            found.calls.append(("files", SimpleNamespace(config=config, pixels=pixels, dtype=dtype)))

        def write(self, folder):
            (folder / "config.json").write_text("{}")

    plan = SimpleNamespace(pieces=lambda name, tensor: {f"published.{name}": tensor.to(torch.bfloat16)})
    parameters = {"a": torch.zeros(1), "b": torch.ones(1)}
    monkeypatch.setattr(adapter, "ExportFiles", Files)
    monkeypatch.setattr(adapter, "TensorPlan", lambda config, shapes, stored: plan)
    monkeypatch.setattr(adapter, "meta_model", lambda config: SimpleNamespace(named_parameters=parameters.items))
    return found


@pytest.fixture
def engine_of(seen, tmp_path):
    stage = Stage.model_validate({
        "name": "morl", "objective": "grpo", "train": {"language": {"lr": 1e-3}}, "mixture": {"weights": {"a": 1.0}},
        "budget": {"steps": 1}, "sequence_length": 512, "pixels": dict(zip(("min", "max"), PIXELS)), "precision": "bf16", "seed": 5,
    })  # fmt: skip
    made = []

    def engine(device="cuda:0", alone=False, forbidden=(PAD, START, END), vocabulary=VOCABULARY, known=VOCABULARY):
        seen.device_type = device.partition(":")[0]
        text = SimpleNamespace(
            vocab_size=vocabulary, num_hidden_layers=2, num_key_value_heads=1, hidden_size=64, num_attention_heads=2, head_dim=None
        )
        config = SimpleNamespace(image_token_id=PAD, model_type="qwen2_5_vl", text_config=text, to_dict=dict)
        tokenizer = SimpleNamespace(directory=tmp_path, vocabulary_size=known)
        made.append(adapter.VllmEngine(stage, config, tokenizer, forbidden, (STOP,), WorkerContext(device=device), alone))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def weights():
    return iter([("a", torch.zeros(2)), ("b", torch.ones(1))])


def prompt(number: int, ids: list[int], *sizes: tuple[int, int]) -> Prompt:
    """`sizes`: (rows, columns) of the tokens of each image; every image has pixels of its own."""
    rng = np.random.default_rng(number)
    counts = np.asarray([rows * columns for rows, columns in sizes], np.int32)
    pixels = rng.integers(0, 255, (int(counts.sum()) * 4, FAMILY.row_values), np.uint8)
    facts = np.asarray([(1, 2 * rows, 2 * columns) for rows, columns in sizes], np.int32).reshape(-1, 3)
    positions = np.zeros((3, len(ids)), np.int32)
    about = {"key": ("prompts", number), "id": str(number), "task": "task"}
    return Prompt(np.asarray(ids, np.int32), positions, pixels, facts, counts, counts * 4, **about)


def two_prompts(samples: int = 3) -> tuple[list[Prompt], Sampling]:
    pictures = prompt(0, [1, START, PAD, PAD, PAD, END, START, PAD, END, 2], (1, 3), (1, 1))
    return [pictures, prompt(1, [3, 4])], Sampling(samples=samples, max_tokens=3, temperature=0.7, seed=11)


PROMPTS, SAMPLING = two_prompts()


def test_weights_go_without_a_file_and_the_engine_sleeps_during_the_update(engine_of, seen):
    engine = engine_of()
    engine.sleep()
    assert seen.calls == [], "there is nothing to put to sleep before the first weights"
    engine.update_weights(weights)
    options = dict(seen.calls)["open"]
    assert {name: (len(tensor), tensor.dtype) for name, tensor in seen.weights.items()} == {
        "published.a": (1, torch.bfloat16), "published.b": (1, torch.bfloat16),
    }, "the rows of the model that vLLM has, in its precision"  # fmt: skip
    assert options["logprobs_mode"] == "processed_logprobs", "of the tempered distribution without banned tokens"
    assert (options["dtype"], options["max_model_len"], options["generation_config"]) == ("bfloat16", 512, "vllm")
    assert options["limit_mm_per_prompt"]["video"] == 0
    assert options["enable_sleep_mode"]
    assert [file.name for file in Path(options["model"]).iterdir()] == ["config.json"]
    seen.calls.clear()
    engine.sleep()
    engine.update_weights(weights)
    engine.wake()
    assert seen.calls == [
        ("sleep", 2), ("wake_up", ["weights"]), ("collective_rpc", "take_streamed_weights"), ("wake_up", ["kv_cache"]),
        ("reset_encoder_cache", None), ("reset_prefix_cache", None),
    ]  # fmt: skip
    engine.close()
    engine.close()
    assert (seen.alive, seen.names.count("shutdown")) == (0, 1), "its process ends with it, once"


def test_weights_may_come_in_parts_and_what_fails_on_the_way_is_said(engine_of, seen):
    engine = engine_of()
    first, second = list(weights())
    engine.update_weights(lambda: iter([first]))
    with pytest.raises(AssertionError, match=r"has not brought \['b'\]"):
        engine.generate(PROMPTS, SAMPLING)
    engine.update_weights(lambda: iter([second]))
    assert sorted(seen.weights) == ["published.a", "published.b"]
    large = [("a", torch.zeros(1)), ("b", torch.ones(1, 2**20))]

    def refuses(self, weights_iterator):
        name, _ = next(weights_iterator)
        raise ValueError(f"no place for {name}")

    engine._loaded._llm._worker.__class__.reload_weights = refuses
    with pytest.raises(TerraceError, match=r"did not take the policy's weights \(no place for published.a\)"):
        engine.update_weights(lambda: iter(large))


@pytest.mark.parametrize(("device", "alone"), [("cuda:0", False), ("cuda:0", True), ("cpu", False), ("cpu", True)])
def test_images_come_back_after_an_update(engine_of, seen, device, alone):
    engine = engine_of(device, alone)
    for _ in range(3):
        engine.update_weights(weights)
        engine.wake()
        assert len(engine.generate(PROMPTS, SAMPLING)) == 2
        assert len(engine.generate(PROMPTS, SAMPLING)) == 2
        engine.sleep()
    assert ("sleep" in seen.names) == (device != "cpu" and not alone)
    options = dict(seen.calls)["open"]
    assert options["enable_sleep_mode"] == (device != "cpu" and not alone)
    if device == "cpu":  # the share would be one of the host's memory
        assert "gpu_memory_utilization" not in options
        assert options["kv_cache_memory_bytes"] == 2**30 + 512 * 2 * 2 * 32 * 2
    else:
        assert options["gpu_memory_utilization"] == (0.9 if alone else 0.5)
        assert "kv_cache_memory_bytes" not in options


@pytest.mark.parametrize(("before", "device", "shown"), [
    (None, "cuda:0", "0"), (None, "cuda:3", "3"), ("4,6", "cuda:1", "6"), ("GPU-a,GPU-b", "cuda:0", "GPU-a"), ("5", "cpu", "5"),
])  # fmt: skip
def test_its_process_sees_the_workers_gpu_alone(engine_of, seen, monkeypatch, before, device, shown):
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    engine_of(device).update_weights(weights)
    assert dict(seen.calls)["open"]["visible"] == shown
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_prompts_are_un_expanded_and_every_sample_has_its_own_seed(engine_of, seen):
    engine = engine_of()
    engine.update_weights(weights)
    arrived = []
    groups = engine.generate(PROMPTS, SAMPLING, lambda place, group: arrived.append((place, len(group))))
    requests = [request for name, several in seen.calls if name == "generate" for request in several]
    assert [request["prompt_token_ids"] for request, _ in requests[::3]] == [[1, START, PAD, END, START, PAD, END, 2], [3, 4]]
    pictures = requests[0][0]["multi_modal_data"]["image"]
    assert [picture.size for picture in pictures] == [(84, 28), (28, 28)]
    shown = FAMILY.pictures_of(PROMPTS[0].pixels[12:], (1, 2, 2))[0]
    assert (np.asarray(pictures[1]) == shown).all(), "the pixels that the trainer sees"
    assert "multi_modal_data" not in requests[3][0]
    seeds = [parameters.seed for _, parameters in requests]
    assert len(set(seeds)) == 6
    for _, parameters in requests:
        assert (parameters.n, parameters.max_tokens, parameters.temperature, parameters.top_p) == (1, 3, 0.7, 1.0)
        assert parameters.logit_bias == {PAD: -100.0, START: -100.0, END: -100.0}
        assert parameters.stop_token_ids == [STOP]
    assert arrived == [(1, 3), (0, 3)], "a group as soon as its last response is there"
    assert [response.tokens.tolist() for response in groups[1]] == [[3, 3, 3], [4, STOP], [5, 5, 5]]
    assert [response.finished for response in groups[1]] == [False, True, False]
    assert groups[1][0].logprobs.tolist() == [-1.0, -1.5, -2.0]
    engine.generate(PROMPTS[1:], SAMPLING)
    assert [parameters.seed for _, parameters in seen.calls[-1][1]] == seeds[3:], "whatever else is in the batch"


def test_prompts_are_asked_for_as_there_is_room_and_what_is_left_over_is_given_up(engine_of, seen, monkeypatch):
    monkeypatch.setattr(vllm_module, "PLACES", 6)
    engine = engine_of()
    engine.update_weights(weights)
    asked, complete = [], []

    def source():
        for number in range(20):
            if number == 1:
                yield None
            asked.append(len(complete))
            yield prompt(number, [3, 4])

    groups = engine.generate(source(), SAMPLING, lambda place, group: complete.append(place), stop=lambda: len(complete) >= 3)
    assert asked[:2] == [0, 0]
    assert asked[2:] == sorted(asked[2:])
    assert asked[-1] > 0, "as places became free"
    assert 3 <= len(groups) == len(complete) < len(asked) < 20
    assert seen.names[-1] == "abort_request"
    assert len(engine.generate([prompt(2, [3, 4])], SAMPLING)) == 1, "without what was given up"
    assert not engine._loaded._llm.llm_engine.waiting


def test_tokens_are_told_as_they_come_each_once(engine_of, seen):
    engine = engine_of()
    engine.update_weights(weights)
    told: dict[tuple[int, int], list[list[int]]] = {}
    groups = engine._loaded.generate(PROMPTS, SAMPLING, None, lambda *who: told.setdefault(who[:2], []).append(list(who[2])))
    for place, group in enumerate(groups):
        for sample, response in enumerate(group):
            assert [token for piece in told[place, sample] for token in piece] == response.tokens.tolist()
    assert any(len(pieces) > 1 for pieces in told.values()), "some came in pieces"


def test_neighbouring_images_stay_images_of_their_own(engine_of, seen):
    engine = engine_of()
    engine.update_weights(weights)
    engine.generate([prompt(5, [PAD] * 7 + [1], (2, 2), (1, 3))], Sampling(1, 2))
    assert dict(seen.calls)["generate"][0][0]["prompt_token_ids"] == [PAD, PAD, 1]


def test_an_error_on_the_way_leaves_nothing_for_the_next_call(engine_of, seen):
    engine = engine_of()
    engine.update_weights(weights)

    def refuse(place, group):
        raise InputError("the reward failed")

    with pytest.raises(InputError, match="the reward failed"):
        engine.generate(PROMPTS, SAMPLING, refuse)
    assert seen.names[-1] == "abort_request"
    assert [len(group) for group in engine.generate(PROMPTS, SAMPLING)] == [3, 3]
    seen.expands_by = 1
    with pytest.raises(TerraceError, match=r"prompt 0: vllm expands its images to 12 tokens in all, Terrace to 10.*native"):
        engine.generate(PROMPTS, SAMPLING)


def test_the_end_of_its_process_is_named(engine_of, seen):
    engine = engine_of()
    engine.update_weights(weights)
    seen.dies_at_step = 2
    with pytest.raises(VllmLost, match="its process ended"):
        engine.generate(PROMPTS, SAMPLING)


def test_who_waits_for_a_killed_process_hears_of_its_end():
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    process.start()
    answer: Future = Future()
    resources = SimpleNamespace(engine_manager=SimpleNamespace(processes=[process]), engine_dead=False)
    core = SimpleNamespace(resources=resources, outputs_queue=queue.Queue(), utility_results={1: answer})
    guard = watch(core, lambda: RuntimeError("gone"))
    with pytest.raises(queue.Empty):
        core.outputs_queue.get(timeout=0.2)
    process.kill()
    assert str(core.outputs_queue.get(timeout=30)) == "gone"
    with pytest.raises(RuntimeError, match="gone"):
        answer.result(timeout=30)
    assert resources.engine_dead
    process.join()
    guard.release()
    assert watch(SimpleNamespace(), lambda: RuntimeError("gone")) is None, "one that decodes in this process"


@pytest.mark.parametrize("released", [False, True])
def test_a_process_ends_with_a_killed_trainer_but_not_when_it_was_let_go(released):
    script = (
        "import os, signal, subprocess, sys\nfrom terrace.generation.vllm_process import Guard\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], stdout=subprocess.DEVNULL)\n"
        "guard = Guard([child.pid])\n"
        "print(child.pid, flush=True)\nif sys.argv[1] == 'True': guard.release()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(released)], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    child = psutil.Process(int(ended.stdout))
    if released:
        with pytest.raises(psutil.TimeoutExpired):
            child.wait(timeout=1)
        child.kill()
    child.wait(timeout=30)


def test_ids_that_the_tokenizer_lacks_are_cut_off_and_too_many_others_refused(engine_of, seen):
    engine = engine_of(vocabulary=5000, forbidden=(PAD, *range(VOCABULARY, 5000)))
    engine.update_weights(weights)
    assert dict(seen.calls)["files"].config.text_config.vocab_size == VOCABULARY
    engine.generate(PROMPTS, SAMPLING)
    assert dict(seen.calls)["generate"][0][1].logit_bias == {PAD: -100.0}
    engine = engine_of(vocabulary=3000, forbidden=tuple(range(2000)), known=3000)
    with pytest.raises(InputError, match=r"2000 tokens may not be sampled"):
        engine.update_weights(weights)


def test_log_probabilities_of_a_nucleus_are_not_compared(engine_of, seen):
    engine = engine_of()
    engine.update_weights(weights)
    known = engine.generate(PROMPTS, SAMPLING)
    nucleus = engine.generate(PROMPTS, Sampling(3, 3, 0.7, top_p=0.9))
    greedy = engine.generate(PROMPTS, Sampling(1, 3, 0.0, top_p=0.9))
    assert all(np.isnan(response.logprobs).all() for group in nucleus for response in group)
    assert not any(np.isnan(response.logprobs).any() for group in [*known, *greedy] for response in group)
    for groups, compared in ((known, True), (nucleus, False)):
        figures = UpdateFigures()
        trained = [TrainGroup(one, tuple(group), (1.0,) * 3) for one, group in zip(PROMPTS, groups)]
        count = sum(len(response.tokens) for group in groups for response in group)
        zeros = torch.zeros(count)
        figures.add(trained, {"logprobs": zeros, "entropies": zeros, "clipped": torch.zeros(()), "kl": torch.zeros(())})
        fields = figures.outcome(WorkerContext()).fields
        assert fields["logprobs_compared"] == float(compared)
        assert ("logprob_mismatch_mean" in fields, "logprob_mismatch_max" in fields) == (compared, compared)
        if compared:
            assert fields["logprob_mismatch_max"] == 2.0


@pytest.mark.parametrize(("own", "device", "words"), [
    ("cuda", "cpu", "computes on cuda, this worker on cpu.*gpus_per_worker"), ("cpu", "cuda:0", "computes on cpu, this worker on cuda"),
    ("", "cuda:1", "no device of this machine"),
])  # fmt: skip
def test_another_device_than_vllms_is_refused(engine_of, seen, monkeypatch, own, device, words):
    monkeypatch.setattr(type(seen), "device_type", property(lambda _: own, lambda *_: None))
    with pytest.raises(InputError, match=words):
        engine_of(device)


def test_the_folder_is_private_and_what_a_killed_process_left_is_removed(seen, tmp_path):
    script = (
        "import os, signal, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from terrace.generation.vllm_folder import PrivateFolder\n"
        "(PrivateFolder().path / 'weights').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, timeout=60)
    [left] = tmp_path.glob(f"{PREFIX}*")
    (tmp_path / f"{PREFIX}file").write_text("not a folder")
    (tmp_path / f"{PREFIX}link").symlink_to(left)
    first = PrivateFolder()
    second = PrivateFolder()
    assert not left.exists()
    assert first.path.is_dir(), "that of a process that lives stays"
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    assert first.path != second.path
    for folder in (first, second):
        folder.close()
        folder.close()
        assert not folder.path.exists()


def test_a_picture_within_the_stages_bounds_stays_as_it_is():
    rng = np.random.default_rng(0)
    for most in (784, 6272, 50_000):
        bounds = settled_bounds(FAMILY, most)
        for width, height in [*rng.integers(1, 600, (200, 2)).tolist(), [2000, 10], [10, 2000], [1990, 11]]:
            if max(width, height) > 200 * min(width, height):
                continue
            low = int(rng.integers(784, most + 1))
            tall, wide = FAMILY.view(width, height, (min(low, most), most)).size
            assert FAMILY.view(wide, tall, bounds).size == (tall, wide)


def test_a_view_of_a_model_has_its_files_and_other_bounds(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json"):
        (model / name).write_text("{}")
    view = with_bounds(model, FAMILY, (784, 9000), tmp_path / "view")
    assert sorted(file.name for file in view.iterdir()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert Path(view / "model.safetensors").resolve() == model / "model.safetensors"
    assert FAMILY.exported_pixels({"size": {"shortest_edge": 784, "longest_edge": 9000}}) == (784, 9000)
    assert '"max_pixels": 9000' in (view / "preprocessor_config.json").read_text()
    with pytest.raises(InputError, match=r"no model directory"):
        with_bounds(tmp_path / "nothing", FAMILY, (784, 9000), tmp_path / "other")
