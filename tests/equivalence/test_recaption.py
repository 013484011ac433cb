"""`terrace recaption`: every caption is kept or refused once, a kill changes nothing, and the models say what they say elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONFIGS
from PIL import Image
from s3_server import ACCESS, serve_s3
from towers import TOWERS
from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForImageTextRetrieval, CLIPModel

from terrace.cli import main
from terrace.data.sources.ingest import ingest_source
from terrace.data.sources.shard_walk import scan_shard
from terrace.data.tokenizer import train_tokenizer
from terrace.errors import InputError
from terrace.evaluate.engine import load_model
from terrace.evaluate.replies import Reply, Settings
from terrace.evaluate.vectors import load_vector_model
from terrace.families.registry import family_class
from terrace.models.build import build_model, model_config
from terrace.models.export import export_hf
from terrace.recaption import models
from terrace.recaption import run as recaption_run
from terrace.recaption.captions import question
from terrace.recaption.models import OpenModels, open_models
from terrace.recipe.errors import RecipeError
from terrace.recipe.loading import load_recipe
from terrace.recipe.schema import Data, Model, Source, Storage
from terrace.recipe.schema_recaption import Recaption
from terrace.storage.s3 import s3

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
COLOURS = {"red": (230, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}
PIXELS = {"qwen2_5_vl": (3136, 12544), "clip": (1, 3_136), "blip_2_matching": (1, 3_136)}
TEXTS = ["Describe the image in one sentence. A picture in red, green or blue, number 0 1 2 3 4 5 6 7 8 9."] * 10


def png(number: int) -> bytes:
    pixels = np.full((40 + number % 7, 60, 3), list(COLOURS.values())[number % 3], np.uint8)
    pixels[: number + 1, 0] = 0  # no two pictures are the same
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_tars(folder: Path) -> None:
    """Two tars of 13 and 11 samples: three are broken, one has two pictures, one has none, and one tells its own caption twice."""
    folder.mkdir()
    for shard, numbers in enumerate((range(13), range(13, 24))):
        with tarfile.open(folder / f"web-{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in numbers:
                name = list(COLOURS)[number % 3]
                members = {"png": png(number), "txt": f"A picture in {name}, number {number}".encode()}
                if number == 3:
                    members["png"] = members["png"][:90]
                if number in (5, 20):
                    members["png"] = b"no picture"
                if number == 8:
                    members = {"0.png": png(8), "1.png": png(9), "txt": b"two"}
                if number == 17:
                    members = {"txt": b"none"}
                if number == 10:
                    members["txt"] = b"written 10"
                for suffix, data in members.items():
                    header = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))


@dataclass
class Fake:
    """Models that say what the number in the picture's name says, and count what they are asked."""

    asked: list[str]

    def write(self, cases):
        self.asked += [case.id for case in cases]
        replies = []
        for case in cases:
            number = int(case.id.rpartition("-")[2])
            text = "  " if number == 1 else f"written\n {number}"
            replies.append(Reply(text, 4, finished=number != 2))
        return replies

    def judge(self, cases, texts):
        return [0.5 + 0.01 * int(case.id.rpartition("-")[2]) - 0.2 * text.startswith("written") for case, text in zip(cases, texts)]


def job_of(folder: Path, out: str = "out", **values) -> recaption_run.Job:
    wanted = Recaption(source="web", out=str(folder / out), captioner=str(folder), samples_per_shard=5, **values)
    source = Source(uri=str(folder / "web"), kind="caption")
    data = Data(sources={"web": source})
    return recaption_run.Job("better", wanted, source, data, ingest_source("web", source, data, folder / "data"), Settings(batch_size=4))


def kept_samples(folder: Path) -> list[dict]:
    samples = []
    for shard in sorted((folder / "shards").glob("*.tar")):
        for group in scan_shard(str(shard)):
            assert group.refusal is None
            samples.append(json.loads(group.data["json"]))
            assert group.data["0.png"] == png(int(samples[-1]["metadata"]["recaption"]["id"].rpartition("-")[2]))
    return samples


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def world(tmp_path, monkeypatch):
    write_tars(tmp_path / "web")
    (tmp_path / "config.json").write_text("{}")  # the folder stands for both models
    fake = Fake([])
    monkeypatch.setattr("terrace.recaption.models.open_models", lambda *_: OpenModels(fake.write, fake.judge))
    return tmp_path, fake


def test_every_caption_is_kept_or_refused_once(world):
    folder, fake = world
    job = job_of(folder, filter=str(folder), threshold=0.5)
    report = recaption_run.run(job)
    refused = [json.loads(line) for line in (folder / "out" / "refused.jsonl").read_text().splitlines()]
    assert report["refused"] == dict(Counter(line["reason"] for line in refused).most_common())
    assert report["samples"] == 24
    assert report["pictures"] == 19
    told = {reason: sorted(line["origin"] for line in refused if line["reason"] == reason) for reason in report["refused"]}
    assert told["cut_off"] == ["web-0.tar:002"]
    assert told["empty_caption"] == ["web-0.tar:001"]
    assert told["not_one_picture"] == ["web-0.tar:008"]
    assert told["repeated"] == ["web-0.tar:010"]
    assert told["empty_text" if "empty_text" in told else "missing_image"]
    assert sum(report["kept"].values()) + len(refused) == 2 * report["pictures"] + (report["samples"] - report["pictures"])
    samples = kept_samples(folder / "out")
    assert Counter(one["metadata"]["recaption"]["text"] for one in samples) == report["kept"]
    assert len({(one["id"], one["messages"][0]["content"][-1]["text"]) for one in samples}) == len(samples)
    for one in samples:
        told = one["metadata"]["recaption"]
        assert told["score"] >= 0.5
        text = one["messages"][0]["content"][-1]["text"]
        number = int(told["id"].rpartition("-")[2])
        if told["text"] == "written":
            assert text == f"written {number}"
            assert told["own"] == f"A picture in {list(COLOURS)[number % 3]}, number {number}"
            assert told["captioner"] == str(folder)
    # Again: nothing is asked; other settings do not mix with what is there.
    asked = len(fake.asked)
    assert recaption_run.run(job) == report
    assert len(fake.asked) == asked == 19
    with pytest.raises(InputError, match="made with another threshold"):
        recaption_run.run(job_of(folder, filter=str(folder), threshold=0.6))
    with pytest.raises(InputError, match=r"no caption was kept .*low_score"):
        recaption_run.run(job_of(folder, "none", filter=str(folder), threshold=2.0))
    # Three workers make the same parts between them.
    job = job_of(folder, "shared", filter=str(folder), threshold=0.5)
    job = replace(job, settings=replace(job.settings, workers=3))
    recaption_run.write_file(str(folder / "shared" / "settings.json"), b"{}")
    shares = [recaption_run.share_of_worker(job, worker) for worker in (2, 0, 1)]
    assert all(shares)
    recaption_run.finish(job, sorted(part for share in shares for part in share))
    assert digest(folder / "shared" / "shards") == digest(folder / "out" / "shards")


def killed_at(job: recaption_run.Job, call: int) -> None:
    """The process of a run that dies by SIGKILL before its `call`-th file appears."""
    made = 0

    def dying(real):
        def wrapped(*arguments):
            nonlocal made
            made += 1
            if made == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return wrapped

    recaption_run.upload, recaption_run.write_file = dying(recaption_run.upload), dying(recaption_run.write_file)
    recaption_run.run(job)


def test_killed_before_any_file_appears_it_ends_with_the_same_bytes(world):
    folder, fake = world
    options = {"filter": str(folder), "threshold": 0.5}
    recaption_run.run(job_of(folder, "whole", **options))
    wanted = digest(folder / "whole")
    wanted = {name: value for name, value in wanted.items() if name != "recaption.json"}  # which names the folder
    assert sum(name.startswith("parts/") for name in wanted) == 6
    context = multiprocessing.get_context("fork")
    for call in range(1, 16):
        job = job_of(folder, f"killed-{call}", **options)
        process = context.Process(target=killed_at, args=(job, call))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        fake.asked.clear()
        there = len(list((folder / f"killed-{call}" / "parts").glob("*.json")))
        recaption_run.run(job)
        assert len(fake.asked) <= 19 - 3 * there  # the parts that had their receipt ask nobody
        found = digest(folder / f"killed-{call}")
        found.pop("recaption.json")
        assert found == wanted


def test_mistakes_in_the_section_are_named():
    def problems(**values) -> str:
        section = json.dumps({"better": {"source": "captions", "out": "out", **values}})
        try:
            load_recipe(TINY, [f"recaption={section}"])
        except RecipeError as error:
            return str(error)
        return ""

    sound = {"captioner": "model", "filter": "judge", "threshold": 0.3}
    assert problems(**sound) == ""
    assert "recaption.better.source: there is no source caption; did you mean `captions`?" in problems(**sound | {"source": "caption"})
    assert "recaption.better.threshold" in problems(captioner="model", filter="judge")
    assert "recaption.better.filter" in problems(captioner="model", threshold=0.3)
    assert "recaption.better.captioner: nobody writes them" in problems(filter="judge", threshold=0.3)
    assert "recaption.better.captioner: texts do not have" in problems(**sound, texts=["own"])
    assert "recaption.better.filter: without it" in problems(texts=["own"])
    assert "recaption.better.out: http:// is not read here" in problems(**sound | {"out": "http://x/y"})


def export(name: str, folder: Path) -> Path:
    family = family_class(name)
    config_map = TOWERS.get(name) or CONFIGS[name]
    tokenizer = train_tokenizer(TEXTS, 400, folder / f"{name}-tokenizer", family)
    section = Model.model_validate({"architecture": name, "config": config_map})
    config = model_config(section, tokenizer)
    state = {}
    for number, (key, parameter) in enumerate(build_model(section, config).named_parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        state[key] = parameter.detach() + (0.1 * noise if parameter.dim() > 1 else 0.0)
    return export_hf(state, config, tokenizer.directory, folder / name, pixels=PIXELS[name])


@pytest.mark.slow
@pytest.mark.parametrize("judge", ["clip", "blip_2_matching"])
def test_models_caption_and_judge_as_they_do_elsewhere(judge, tmp_path, capsys):
    torch.set_num_threads(1)
    write_tars(tmp_path / "web")
    captioner, filtering = export("qwen2_5_vl", tmp_path), export(judge, tmp_path)
    section = {
        "source": "captions", "out": str(tmp_path / "out"), "captioner": str(captioner), "filter": str(filtering), "threshold": -1.0,
        "max_new_tokens": 5, "temperature": 1.0, "top_p": 0.9, "samples_per_shard": 4,
    }  # fmt: skip
    recipe = [str(TINY), f"data.sources.captions.uri={tmp_path / 'web'}", f"recaption={json.dumps({'better': section})}"]
    common = ["--device", "cpu", "--run-dir", str(tmp_path / "run"), "--json"]
    assert main(["recaption", *recipe, *common]) == 0
    report = json.loads(capsys.readouterr().out)
    samples = kept_samples(tmp_path / "out")
    assert len(samples) == sum(report["kept"].values()) > 18
    told = [one["metadata"]["recaption"] for one in samples]
    texts = [one["messages"][0]["content"][-1]["text"] for one in samples]
    assert len(set(texts)) > 10
    # Its own forward says the same of each pair.
    if judge == "clip":
        model, tokenizer = CLIPModel.from_pretrained(filtering).eval(), AutoTokenizer.from_pretrained(filtering)
        images = [Image.open(io.BytesIO(png(int(one["id"].rpartition("-")[2])))) for one in told]
        pixels = AutoImageProcessor.from_pretrained(filtering)(images, return_tensors="pt")["pixel_values"]
        ids = tokenizer([f"<|startoftext|>{text}" for text in texts], add_special_tokens=False)["input_ids"]
        for place, row in enumerate(ids):
            row = [*row[:15], tokenizer.convert_tokens_to_ids("<|endoftext|>")]
            with torch.no_grad():
                scaled = model(input_ids=torch.tensor([row]), pixel_values=pixels[place : place + 1]).logits_per_image
            assert told[place]["score"] == pytest.approx(float(scaled.detach() / model.logit_scale.detach().exp()), abs=2e-5)
    else:
        model, _ = Blip2ForImageTextRetrieval.from_pretrained(filtering, output_loading_info=True)
        loaded = load_vector_model(filtering, "cpu", "fp32", 8, None)
        queries = model.config.num_query_tokens
        for one, text in zip(told, texts):
            image = png(int(one["id"].rpartition("-")[2]))
            shown = Image.open(io.BytesIO(image))
            case = question_of(image, (shown.width, shown.height))
            pixels, facts = loaded._seen([case])
            ids, mask = loaded._read([text])
            with torch.no_grad():
                ids, mask = torch.cat([torch.full((1, queries), 1), ids], 1), torch.cat([torch.ones(1, queries), mask], 1).long()
                given = {"pixel_values": loaded_inputs(loaded, pixels, facts), "input_ids": ids, "attention_mask": mask}
                found = model.eval()(**given, use_image_text_matching_head=True).logits_per_image.softmax(1)[0, 1]
            assert one["score"] == pytest.approx(found.item(), abs=2e-5)
    # The captioner says the same to a picture alone, and two processes make the same shards.
    speaker = load_model(captioner, "cpu")
    for one, text in [(one, text) for one, text in zip(told, texts) if one["text"] == "written"][:3]:
        image = png(place := int(one["id"].rpartition("-")[2]))
        shown = Image.open(io.BytesIO(image))
        [reply] = speaker.reply([question_of(image, shown.size, one["id"], place % 13)], 5, 1.0, 0.9, 0)
        assert " ".join(reply.text.split()) == text
    before = digest(tmp_path / "out" / "shards")
    assert main(["recaption", *recipe, f"recaption.better.out={tmp_path / 'two'}", "--workers", "2", *common]) == 0
    assert digest(tmp_path / "two" / "shards") == before
    # A source reads what came out.
    source = Source(uri=str(tmp_path / "out" / "shards"), kind="caption")
    assert ingest_source("better", source, Data(sources={"better": source}), tmp_path / "data").in_place
    with pytest.raises(InputError, match="a captioner writes text"):
        open_models(Recaption(**section | {"captioner": str(filtering)}), Settings(device="cpu"), 0)
    with pytest.raises(InputError, match="a filter compares a picture with a text"):
        open_models(Recaption(**section | {"filter": str(captioner)}), Settings(device="cpu"), 0)


def question_of(image: bytes, size, name: str = "one", place: int = 0):
    from terrace.data.types import Sample
    from terrace.recaption.captions import Pictured

    prompt = Recaption.model_fields["prompt"].default
    return question(Pictured("", place, Sample(name, "caption", []), image, tuple(size)), prompt)


def loaded_inputs(loaded, pixels, facts):
    from terrace.models.families.registry import family_of_model

    return family_of_model(loaded.network).inputs(pixels, facts)["pixel_values"]



@pytest.mark.slow
def test_shards_go_to_an_object_store_and_a_kill_on_the_way_changes_nothing(world, monkeypatch):
    """To a store that fails requests now and then: the same files as in a folder, each the same bytes."""
    folder, fake = world
    options = {"filter": str(folder), "threshold": 0.5}
    recaption_run.run(job_of(folder, "whole", **options))
    wanted = {name: value for name, value in digest(folder / "whole").items() if name != "recaption.json"}  # which names the folder
    with serve_s3() as server:
        for name, value in ACCESS.items():
            monkeypatch.setenv(name, value)
        storage = Storage(endpoint_url=server.url)
        s3(storage).mkdir("bucket")
        local = job_of(folder, **options)
        job = replace(
            local, wanted=local.wanted.model_copy(update={"out": "s3://bucket/deep/better"}),
            data=local.data.model_copy(update={"storage": storage}),
        )  # fmt: skip
        server.fault = lambda number, method: 503 if number % 7 == 3 else None
        for call in (2, 5, 9):  # after the mark of the settings, after a shard, between a shard and its receipt
            process = multiprocessing.get_context("spawn").Process(target=killed_with_fakes, args=(job, call))
            process.start()
            process.join(120)
            assert process.exitcode == -signal.SIGKILL
        fake.asked.clear()
        report = recaption_run.run(job)
        assert 0 < len(fake.asked) < 19, "parts with a receipt ask nobody"
        assert server.failed
        server.fault = None
        assert recaption_run.run(job) == report
        root, store = "bucket/deep/better/", s3(storage)
        found = {path.removeprefix(root): hashlib.sha256(store.cat_file(path)).hexdigest() for path in store.find(root)}
        found.pop("recaption.json")
        assert found == wanted
        source = Source(uri="s3://bucket/deep/better/shards", kind="caption")
        read = ingest_source("better", source, job.data.model_copy(update={"sources": {"better": source}}), folder / "read")
        groups = [group for shard in read.shards for group in scan_shard(shard.uri, storage)]
        assert len(groups) == sum(report["kept"].values())
        assert all(group.refusal is None for group in groups)


def killed_with_fakes(job: recaption_run.Job, call: int) -> None:
    """In a process of its own, whose connections are its own: another run that dies before its `call`-th file."""
    fake = Fake([])
    models.open_models = lambda *_: OpenModels(fake.write, fake.judge)
    killed_at(job, call)
