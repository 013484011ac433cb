"""Conversations with system prompts, tools, calls, results, images and masks: the ids of transformers' `apply_chat_template`.

The template below is Qwen2.5's published one for tools, with the content items of Qwen2.5-VL's. The answers that are learnt are found in
the reference by their turns, not by what the reader says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from terrace.data.index.build import measure_any
from terrace.data.order.eligible import Sized, _first_target, visual_ranges
from terrace.data.sources.conventions import Rules, convert_row
from terrace.data.template import encode_sample
from terrace.data.tokenizer import load_tokenizer
from terrace.errors import InputError
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.families.qwen3_vl import Qwen3VL

FAMILY = Qwen25VL()
PIXELS = (3136, 50_176)
SIZES = [(56, 84), (200, 100), (28, 28)]
TEMPLATE = r"""
{%- macro say(content) %}
    {%- if content is string %}{{- content }}
    {%- else %}
        {%- for item in content %}
            {%- if item.type == 'image' or 'image' in item or 'image_url' in item %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in item %}{{- item.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- say(messages[0].content) }}
    {%- else %}{{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + say(messages[0].content) + '<|im_end|>\n' }}
    {%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + say(message.content) + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + say(message.content) }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- say(message.content) }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path):
    return load_tokenizer(shared_data / "tokenizers" / "qwen2")


@pytest.fixture(scope="module")
def reference(shared_data: Path):
    """transformers' own tokenizer of the same files, with the template."""
    transformers = pytest.importorskip("transformers")
    file = shared_data / "tokenizers" / "qwen2" / "tokenizer.json"
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), chat_template=TEMPLATE)


WORDS = st.text(st.sampled_from("aé数 .,<>{}\"'_1\n"), min_size=1, max_size=12).filter(lambda text: not text[0].isspace())
VALUES = st.recursive(st.integers(0, 99) | WORDS | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=2), max_leaves=3)
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "Ort"]), VALUES, max_size=2)
CALLS = st.lists(st.tuples(st.sampled_from(["look", "add_2"]), ARGUMENTS), max_size=2)
TOOLS = st.lists(st.dictionaries(st.sampled_from(["name", "description"]), WORDS, min_size=1, max_size=2).map(
    lambda function: {"type": "function", "function": function}), max_size=2)  # fmt: skip


@st.composite
def rows(draw: Any) -> dict[str, Any]:
    """A row in OpenAI's form, with images, masks and tools; answers think aloud now and then."""
    messages: list[dict[str, Any]] = []
    images = 0
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(WORDS)})
    for _ in range(draw(st.integers(1, 3))):
        shown = draw(st.integers(0, min(2, len(SIZES) - images)))
        images += shown
        items = [{"type": "image"}] * shown + [{"type": "text", "text": draw(WORDS)}]
        messages.append({"role": "user", "content": draw(st.permutations(items)) if shown else items[0]["text"]})
        calls = draw(CALLS)
        if calls:
            made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
            messages.append({"role": "assistant", "content": draw(st.just("") | WORDS), "tool_calls": made})
            messages += [{"role": "tool", "content": draw(WORDS)} for _ in calls]
        thought = draw(st.sampled_from(["", "<think>\nWell.\n</think>\n\n"]))
        messages.append({"role": "assistant", "content": thought + draw(WORDS)})
        if draw(st.booleans()):
            messages[-1]["weight"] = draw(st.sampled_from([0, 1]))
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(WORDS)})  # a conversation that ends in a question
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        next(message for message in messages if message["role"] == "assistant").pop("weight", None)
    return {"messages": messages, "tools": draw(TOOLS), "images": [f"{number}.png" for number in range(images)]}


def learnt_in(ids: list[int], messages: list[dict[str, Any]], tokenizer: Any) -> list[bool]:
    """Which tokens are targets: of each assistant's turn that is not masked, what follows its header up to and with its end mark."""
    start, end = (tokenizer._tokenizer.token_to_id(mark) for mark in ("<|im_start|>", "<|im_end|>"))
    header = tokenizer.encode("assistant\n")
    answers = iter([message.get("weight", 1) for message in messages if message["role"] == "assistant"])
    flags, place = [False] * len(ids), 0
    while start in ids[place:]:
        place = ids.index(start, place) + 1
        stop = ids.index(end, place)
        if ids[place : place + len(header)] == header:
            flags[place + len(header) : stop + 1] = [bool(next(answers))] * (stop + 1 - place - len(header))
        place = stop
    assert next(answers, None) is None
    return flags


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(row=rows())
def test_ids_targets_and_lengths_are_those_of_the_chat_template(row: dict[str, Any], tokenizer, reference) -> None:
    sample, images = convert_row(row, "x", "qa")
    sizes = SIZES[: len(images)]
    encoded = encode_sample(sample, sizes, tokenizer, FAMILY, PIXELS)
    text = reference.apply_chat_template(row["messages"], tools=row["tools"] or None, tokenize=False)
    pads = iter(FAMILY.view(*size, PIXELS).tokens for size in sizes)
    for _ in sizes:
        text = text.replace("<|image_pad|>", "<|placeholder|>" * next(pads), 1)
    expected = reference(text.replace("<|placeholder|>", "<|image_pad|>"))["input_ids"]
    assert encoded.input_ids.tolist() == expected
    assert encoded.supervised.tolist() == learnt_in(expected, row["messages"], tokenizer)
    measure = measure_any(sample, sizes, tokenizer, FAMILY)
    assert measure.length(sizes, PIXELS, FAMILY) == len(expected)
    assert measure.supervised_tokens == encoded.supervised.sum()


def test_where_the_first_target_stands(tokenizer) -> None:
    turns = [{"role": "user", "content": "<image>Is <bbox> or <bbox> red?<image>"}, {"role": "assistant", "content": "a"},
             {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "no", "weight": 0}]  # fmt: skip
    boxes = [[100, 50, 180, 99], [1, 2, 3, 4]]
    row = {"messages": turns, "images": ["a", "b", "c"], "objects": {"bbox": boxes, "image_id": [1, 0]}}
    sample, _ = convert_row(row, "x", "qa")
    sizes = [(56, 84), (200, 100), (28, 28)]
    for pixels in (PIXELS, (3136, 6_000), (100_000, 400_000)):
        encoded = encode_sample(sample, sizes, tokenizer, FAMILY, pixels)
        measure = measure_any(sample, sizes, tokenizer, FAMILY)
        images = Sized(sizes, FAMILY)
        assert _first_target(measure, images, pixels) == int(encoded.supervised.argmax())
        ranges = visual_ranges(measure, images, pixels)
        assert [found.start + 1 for found in ranges] == [visual.start for visual in encoded.visuals]


def test_what_has_no_form_is_refused_by_name(tokenizer) -> None:
    thinking = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x", "reasoning_content": "Hm."}]}
    called = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {}}]}]}
    for row, family, told in ((thinking, FAMILY, "reasoning_content"), (called, Qwen3VL.of({}), "no form for tools")):
        sample, _ = convert_row(row, "x", "qa")
        with pytest.raises(InputError, match=told):
            encode_sample(sample, [], tokenizer, family, PIXELS)


def test_arguments_as_json_text_are_what_they_say(tokenizer) -> None:
    def ids(arguments: Any) -> list[int]:
        call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        return encode_sample(convert_row({"messages": turns}, "x", "qa")[0], [], tokenizer, FAMILY, PIXELS).input_ids.tolist()

    value = {"Ort": "数", "b": [1, None]}
    assert ids(value) == ids(json.dumps(value)) == ids(json.dumps(value, ensure_ascii=False))


def test_special_tokens_are_letters_or_tokens_and_marks_stay_letters(tokenizer) -> None:
    said = "<|box_start|>(10,20),(30,40)<|box_end|> <|no_such_token|> <|im_end|>"
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]}
    letters, tokens = Rules(), Rules(special_tokens=True)
    as_letters, _ = convert_row(row, "x", "qa", letters)
    as_tokens, _ = convert_row(row, "x", "qa", tokens)
    assert letters.spelled == tokens.spelled == 1
    found = [encode_sample(sample, [], tokenizer, FAMILY, PIXELS) for sample in (as_letters, as_tokens)]
    ids = {name: tokenizer.token_id(f"<|{name}|>") for name in ("box_start", "box_end", "im_end")}
    assert not {ids["box_start"], ids["box_end"]} & set(found[0].input_ids.tolist())
    counts = [found[1].input_ids.tolist().count(ids[name]) for name in ("box_start", "box_end", "im_end")]
    assert counts == [1, 1, 3]  # the ends of three turns; the one that the answer spells is letters
    assert tokenizer.decode(found[1].input_ids) == tokenizer.decode(found[0].input_ids)
    for sample, encoded in zip((as_letters, as_tokens), found):
        measure = measure_any(sample, [], tokenizer, FAMILY)
        assert measure.length([], PIXELS, FAMILY) == len(encoded.input_ids)
        assert measure.supervised_tokens == np.count_nonzero(encoded.supervised)
