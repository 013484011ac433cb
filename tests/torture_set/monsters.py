r"""Forms of whole answers, and answers that are meant to take for ever."""

from __future__ import annotations

from .case import Case, T
from .places import BOX

FORMS = [
    Case("format", "<think>a</think><answer>b</answer>", None, 1),
    Case("format", "<think>a</think>\n<answer>b</answer>\n", None, 1),
    Case("format", "<answer>b</answer>", None, 0),
    Case("format", "<think>a</think><answer>b</answer> tail", None, 0),
    Case("format", "<think></think><answer></answer>", None, 0),
    Case("format", "<think>a<think>b</think><answer>c</answer>", None, 0),
    Case("format", r"so \boxed{4}", None, 1, {}, {"form": "boxed"}),
    Case("format", r"\boxed{}", None, 0, {}, {"form": "boxed"}),
    Case("format", r"\boxed{1}\boxed{2}", None, 0, {}, {"form": "boxed"}),
    Case("format", "[1, 2]", None, 1, {}, {"form": "regex", "pattern": r"\[\d, \d\]"}),
    Case("format", "a" * 40 + "!", None, None, {}, {"form": "regex", "pattern": "(a+)+$"}),
]

MEGABYTE = 1_000_000
MONSTERS = [
    Case(T, r"\boxed{9^{9^{9^{9}}}}", r"\sqrt{2}", 0),
    Case(T, r"\boxed{1000000!}", "5", 0),
    Case(T, r"\boxed{\int_0^1 x^{100000} dx}", "5", 0),
    Case(T, r"\boxed{\sum_{k=1}^{10^{10}} k^{k}}", r"\int_0^1 x dx", 0),
    Case(T, "x" * MEGABYTE, "5", 0),
    Case(T, "x" * MEGABYTE + r"\boxed{5}", "5", 1),
    Case(T, "7 " * (MEGABYTE // 2), "5", 0),
    Case(T, "{" * MEGABYTE, "5", 0),
    Case(T, r"\boxed{" * 100_000, "5", 0),
    Case(T, r"\boxed{" + "(" * 1500 + "5" + ")" * 1500 + "}", "5", 1),
    Case(T, "$" * MEGABYTE, "5", 0),
    Case(T, "\\frac" * 200_000, "5", 0),
    Case(T, "<think>" * 100_000, "5", 0),
    Case(T, "Answer: " * 100_000, "5", 0),
    Case(T, "\x00\x01\ud800 5", "5", 1),
    Case(T, "1," * 300_000, "5", 0),
    Case(T, "9" * MEGABYTE, "5", 0),
    Case(T, "-" * MEGABYTE + "5", "5", 0),
    Case(T, r"\boxed{" + "+".join(["x"] * 900) + "}", "900x", 1),
    Case("counting", "4\n" * 300_000, "4", 1),
    Case("counting", "一" * MEGABYTE, "4", 0),
    Case("grounding", "[" * MEGABYTE, BOX, 0),
    Case("grounding", "[1, " * 200_000, BOX, 0),
    Case("grounding", "1 " * 400_000, BOX, 0),
    Case("gui_point", "(1,1)" * 200_000, BOX, 0),
    Case("temporal_grounding", "00:10," * 150_000, "[00:10,00:20]", 0),
    Case("format", "<think>" + "a" * MEGABYTE, None, 0),
]
