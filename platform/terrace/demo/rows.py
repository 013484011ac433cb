"""What the demo's samples say: one writer per source, each a row and its drawn scenes from a random generator alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from terrace.demo import scenes
from terrace.demo.scenes import Scene, Thing

Row = dict[str, Any]

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RESULT_QUESTION = "What is the result of the sum in the picture?"
READ_QUESTION = "Read all the text in the picture, from top to bottom."


# ---------------------------------------------------------------- words for things


def name_of(thing: Thing) -> str:
    """`red circle`, `red bar`, `red sign`, `red button`."""
    if thing.kind == "shape":
        return f"{thing.colour} {thing.name}"
    return f"{thing.colour} {({'bar': 'bar', 'word': 'sign', 'button': 'button'})[thing.kind]}"


def caption_of(scene: Scene) -> str:
    """One or two plain sentences that say everything that is in the scene, in reading order."""
    if scene.kind == "shapes":
        parts = [f"a {name_of(thing)} at the {thing.place}" for thing in scene.things]
        count = len(scene.things)
        noun = "shape" if count == 1 else "shapes"
        return f"{NUMBERS[count].capitalize()} {noun}: {', '.join(parts)}."
    if scene.kind == "sign":
        return " ".join(f"A {thing.colour} sign says {thing.name}." for thing in scene.things)
    if scene.kind == "sum":
        return f"A card with the sum {scene.things[0].name}."
    if scene.kind == "chart":
        bars = ", ".join(f"{thing.colour} {thing.value}" for thing in scene.things)
        return f"A chart with {NUMBERS[len(scene.things)]} bars: {bars}."
    buttons = ", ".join(f"{thing.colour} {thing.name}" for thing in scene.things)
    noun = "button" if len(scene.things) == 1 else "buttons"
    return f"The {scene.title} window with {NUMBERS[len(scene.things)]} {noun}: {buttons}."


def _unique(things: tuple[Thing, ...]) -> list[Thing]:
    """The things whose name stands for nothing else in the scene."""
    names = [name_of(thing) for thing in things]
    return [thing for thing, name in zip(things, names) if names.count(name) == 1]


def _chat(turns: list[tuple[str, str]], images: int = 1, **more: Any) -> Row:
    """A `messages` row whose first question shows the pictures."""
    messages = []
    for place, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": ("<image>" * images if place == 0 else "") + question})
        messages.append({"role": "assistant", "content": answer})
    row = {"messages": messages, **more}
    return {**row, "images": list(range(images))} if images else row


# ---------------------------------------------------------------- one writer per source


def _any_scene(rng: random.Random) -> Scene:
    kind = rng.choices(["shapes", "sign", "sum", "chart", "window"], [12, 4, 2, 3, 3])[0]
    return scenes.DRAWERS[kind](rng.getrandbits(40))


def _caption(rng: random.Random) -> tuple[Row, list[Scene]]:
    scene = _any_scene(rng)
    return {"image": 0, "text": caption_of(scene)}, [scene]


def _interleaved(rng: random.Random, pages: tuple[int, int] = (2, 4)) -> tuple[Row, list[Scene]]:
    """A little picture book: each picture is described after it; the last sentence looks back at the first picture."""
    drawn = [_any_scene(rng) for _ in range(rng.randint(*pages))]
    content: list[Row] = [{"type": "text", "text": f"A book with {len(drawn)} pictures."}]
    for page, scene in enumerate(drawn):
        content.append({"type": "text", "text": f"Picture {page + 1}:"})
        content.append({"type": "image", "image": page})
        content.append({"type": "text", "text": caption_of(scene)})
    content.append({"type": "text", "text": f"Back to picture 1: {caption_of(drawn[0])} The end."})
    return {"content": content}, drawn


def _album(rng: random.Random) -> tuple[Row, list[Scene]]:
    return _interleaved(rng, pages=(8, 14))


def _text(rng: random.Random) -> tuple[Row, list[Scene]]:
    """Sums, comparisons and little inventories in words and digits: what the pictures' questions are made of."""
    sentences = []
    for _ in range(rng.randint(3, 6)):
        a, b = rng.randint(1, 5), rng.randint(1, 4)
        colours, shape = rng.sample(list(scenes.COLOURS), 2), rng.choice(scenes.SHAPES)
        sentences.append(
            rng.choice(
                [
                    f"{a} + {b} = {a + b}.",
                    f"{NUMBERS[a].capitalize()} and {NUMBERS[b]} make {NUMBERS[a + b]}.",
                    f"With {a} {colours[0]} and {b} {colours[1]} {shape}s there are {a + b} {shape}s.",
                    f"There are {a} {colours[0]} {shape}s and {b} {colours[1]} {shape}s: {a} {colours[0]} and {b} {colours[1]},"
                    f" {a} + {b} = {a + b}.",
                    f"{a + b} is more than {a}.",
                    f"Take {b} from {a + b} and {a} are left.",
                ]
            )
        )
    return {"text": " ".join(sentences)}, []


def _ocr(rng: random.Random) -> tuple[Row, list[Scene]]:
    scene = (scenes.draw_sum if rng.random() < 0.35 else scenes.draw_sign)(rng.getrandbits(40))
    text = "\n".join(thing.name for thing in scene.things)
    question = [{"type": "image", "image": 0}, {"type": "text", "text": READ_QUESTION}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]
    if scene.kind == "sum":
        messages += [
            {"role": "user", "content": [{"type": "text", "text": RESULT_QUESTION}]},
            {"role": "assistant", "content": [{"type": "text", "text": str(scene.facts["result"])}]},
        ]
    return {"messages": messages}, [scene]


def box_question(thing: Thing) -> str:
    """The question whose answer is the thing's box."""
    return f"Where is the {name_of(thing)}?"


def _grounding_scene(rng: random.Random) -> tuple[Scene, list[Thing]]:
    while True:
        seed = rng.getrandbits(40)
        scene = scenes.draw_shapes(seed, most=3) if rng.random() < 0.8 else scenes.draw_sign(seed)
        things = _unique(scene.things)
        if things:
            return scene, rng.sample(things, len(things))


def _grounding(rng: random.Random) -> tuple[Row, list[Scene]]:
    scene, things = _grounding_scene(rng)
    turns = [(box_question(thing), "<bbox>") for thing in things]
    objects = {"ref": [name_of(thing) for thing in things], "bbox": [list(thing.box) for thing in things]}
    return _chat(turns, objects=objects), [scene]


def _click_question(rng: random.Random, thing: Thing) -> str:
    wanted = f"the {thing.colour} button" if rng.random() < 0.6 else f"'{thing.name}'"
    return f"Click {wanted}."


def _gui(rng: random.Random) -> tuple[Row, list[Scene]]:
    scene = scenes.draw_window(rng.getrandbits(40))
    things = rng.sample(scene.things, len(scene.things))
    turns = [(_click_question(rng, thing), '{"action": "click", "point": <point>}') for thing in things]
    return _chat(turns, objects={"ref": [], "point": [list(thing.centre) for thing in things]}), [scene]


def _choices(rng: random.Random, right: str, others: list[str]) -> tuple[str, str]:
    """The lines `A. ...` to `D. ...` with the right answer somewhere, and its letter."""
    options = [right, *rng.sample([other for other in others if other != right], min(3, len(others) - 1))]
    rng.shuffle(options)
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options)]
    return "\n".join(lines) + "\nAnswer with the letter.", "ABCD"[options.index(right)]


def _qa(rng: random.Random) -> tuple[Row, list[Scene]]:
    """Yes or no, colour and shape questions, and multiple choice."""
    scene = scenes.draw_shapes(rng.getrandbits(40), most=3)
    thing, turns = rng.choice(scene.things), []
    names = {name_of(other) for other in scene.things}
    there = rng.random() < 0.5
    asked = name_of(thing) if there else f"{rng.choice(list(scenes.COLOURS))} {rng.choice(scenes.SHAPES)}"
    turns.append((f"Is there a {asked} in the picture?", "yes" if asked in names else "no"))
    of_colour = [other for other in scene.things if other.colour == thing.colour]
    if len(of_colour) == 1:
        turns.append((f"Which shape is {thing.colour}?", thing.name))
    of_shape = [other for other in scene.things if other.name == thing.name]
    if len(of_shape) == 1:
        turns.append((f"Which colour has the {thing.name}?", thing.colour))
    elif len(of_colour) == 1:
        options, letter = _choices(rng, thing.name, list(scenes.SHAPES))
        turns.append((f"Which shape is {thing.colour}?\n{options}", letter))
    return _chat(rng.sample(turns, len(turns))), [scene]


def _counting(rng: random.Random) -> tuple[Row, list[Scene]]:
    scene = scenes.draw_shapes(rng.getrandbits(40), most=5, colours=3)
    turns = [("How many shapes are in the picture?", str(len(scene.things)))]
    turns.append(_count_question(rng, scene))
    return _chat(rng.sample(turns, len(turns))), [scene]


def _count_question(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """How many of a shape or of a colour that is (usually) there."""
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        return f"How many {thing.name}s are in the picture?", str(sum(t.name == thing.name for t in scene.things))
    colour = thing.colour if rng.random() < 0.8 else rng.choice(list(scenes.COLOURS))
    return f"How many {colour} shapes are in the picture?", str(sum(t.colour == colour for t in scene.things))


def _chart(rng: random.Random) -> tuple[Row, list[Scene]]:
    scene = scenes.draw_chart(rng.getrandbits(40))
    by_value = sorted(scene.things, key=lambda thing: thing.value)
    turns = [
        ("Which bar is the tallest?", by_value[-1].colour),
        ("Which bar is the smallest?", by_value[0].colour),
        *((f"What is the value of the {bar.colour} bar?", str(bar.value)) for bar in rng.sample(scene.things, 2)),
    ]
    return _chat(rng.sample(turns, len(turns))), [scene]


def _reasoning(rng: random.Random) -> tuple[Row, list[Scene]]:
    """A worked answer: of a word problem without a picture, or of the sum that a picture shows."""
    if rng.random() < 0.3:
        a, b = rng.randint(1, 5), rng.randint(1, 4)
        first, second = rng.sample(list(scenes.COLOURS), 2)
        shape = rng.choice(scenes.SHAPES)
        question = f"There are {a} {first} {shape}s and {b} {second} {shape}s. How many {shape}s are there?"
        answer = f"{a} {first} and {b} {second}: {a} + {b} = {a + b}.\nThe answer is \\boxed{{{a + b}}}."
        return _chat([(question, answer)], images=0), []
    scene = scenes.draw_sum(rng.getrandbits(40))
    answer = f"{scene.things[0].name} = {scene.facts['result']}.\nThe answer is \\boxed{{{scene.facts['result']}}}."
    return _chat([(RESULT_QUESTION + " Explain.", answer)]), [scene]


def _pairs(rng: random.Random) -> tuple[Row, list[Scene]]:
    """A question about a number, its answer and a wrong one beside it."""
    scene = scenes.draw_shapes(rng.getrandbits(40), most=5, colours=3)
    question, answer = ("How many shapes are in the picture?", str(len(scene.things)))
    if rng.random() < 0.5:
        question, answer = _count_question(rng, scene)
    wrong = rng.choice([number for number in range(6) if number != int(answer)])
    return {**_chat([(question, answer)]), "rejected_response": str(wrong)}, [scene]


# ---------------------------------------------------------------- prompts with a checkable answer


def _prompt(question: str, task: str, solution: Any) -> Row:
    return {
        "messages": [{"role": "user", "content": "<image>" + question}],
        "images": [0],
        "task": task,
        "solution": solution,
    }


def _rl_counting(rng: random.Random) -> tuple[Row, list[Scene]]:
    """All shapes, or those of a kind: with one question alone the most frequent answer would be worth too much."""
    scene = scenes.draw_shapes(rng.getrandbits(40), most=5, colours=3)
    question, answer = ("How many shapes are in the picture?", str(len(scene.things)))
    if rng.random() < 0.5:
        question, answer = _count_question(rng, scene)
    return _prompt(question, "counting", answer), [scene]


def _rl_grounding(rng: random.Random) -> tuple[Row, list[Scene]]:
    scene, things = _grounding_scene(rng)
    return _prompt(box_question(things[0]), "grounding", {"bbox": list(things[0].box)}), [scene]


def _rl_arithmetic(rng: random.Random) -> tuple[Row, list[Scene]]:
    scene = scenes.draw_sum(rng.getrandbits(40))
    return _prompt(RESULT_QUESTION, "visual_reasoning", str(scene.facts["result"])), [scene]


def _rl_clicking(rng: random.Random) -> tuple[Row, list[Scene]]:
    """The window of a conversation with the environment `clicking`."""
    scene = scenes.draw_window(rng.getrandbits(40))
    thing = rng.choice(scene.things)
    return _prompt(_click_question(rng, thing), "clicking", {"bbox": list(thing.box)}), [scene]


WRITERS: dict[str, Callable[[random.Random], tuple[Row, list[Scene]]]] = {
    "captions": _caption,
    "interleaved": _interleaved,
    "albums": _album,
    "text": _text,
    "ocr": _ocr,
    "grounding": _grounding,
    "gui": _gui,
    "qa": _qa,
    "counting": _counting,
    "charts": _chart,
    "reasoning": _reasoning,
    "pairs": _pairs,
    "rl/counting": _rl_counting,
    "rl/grounding": _rl_grounding,
    "rl/arithmetic": _rl_arithmetic,
    "rl/clicking": _rl_clicking,
}
