"""Expressions: LaTeX or plain text to a small tree, in time that grows with the text and with nothing else.

A tree is a tuple: ("number", Fraction), ("symbol", name), or (operation, tree, ...). What is no expression (a sentence, an
integral, an unfinished fraction) raises `NoExpression`; the caller may then ask math-verify. Nothing is evaluated here, so
`9^{9^{9^9}}` is four numbers and three powers.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from terrace.rewards.rules.latex import plain

MOST_CHARACTERS = 2_000
MOST_DEPTH = 60
Tree = tuple[Any, ...]

_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "ln", "log", "lg", "exp", "sqrt", "abs",
}  # fmt: skip
_SAME_FUNCTION = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log", "cosec": "csc", "tg": "tan", "ctg": "cot"}
_SYMBOLS = {
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa", "lambda", "mu",
    "nu", "xi", "rho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi",
    "Sigma", "Phi", "Psi", "Omega", "ell", "hbar", "angle", "triangle", "prime", "square", "parallel",
}  # fmt: skip
_WORDS = sorted(_FUNCTIONS | set(_SAME_FUNCTION) | {"pi", "theta", "alpha", "beta", "infinity", "infty"}, key=len, reverse=True)
_TOKEN = re.compile(
    r"\s*(?:(?P<repeating>\d{1,40}\.\d{0,40}\\(?:overline|dot|bar)\s?\{?(?P<period>\d{1,40})\}?(?:\\dot\s?\{?(?P<last>\d)\}?)?)"
    r"|(?P<number>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<letters>[A-Za-z]+)|(?P<sign>[-+*/^_(){}\[\]|!%°']|\\[{}|]))"
)


class NoExpression(ValueError):
    """The text is not an expression that this grammar reads."""


def parse(text: str) -> Tree:
    """The tree of an expression. Raises NoExpression."""
    text = plain(text).strip().rstrip(".,;")
    text = re.sub(r"\(\s*(?:mod|\\mod)\s*\w+\s*\)$|\\p?mod.*$|\(\\bmod.*$", "", text)
    if not text or len(text) > MOST_CHARACTERS:
        raise NoExpression("nothing, or too long")
    parser = _Parser(_tokens(text))
    tree = parser.sum()
    if parser.place < len(parser.tokens):
        raise NoExpression(f"unexpected {parser.tokens[parser.place][1]!r}")
    return tree


def symbols_of(tree: Tree) -> set[str]:
    """The names of the variables in a tree (not e, i and pi)."""
    found, waiting = set(), [tree]
    while waiting:
        node = waiting.pop()
        if node[0] == "symbol":
            found.add(node[1])
        elif node[0] != "number":
            waiting += node[1:]
    return found - {"e", "i", "\\pi"}


def _tokens(text: str) -> list[tuple[str, Any]]:
    tokens: list[tuple[str, Any]] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or match.end() == place:
            if not text[place:].strip():
                break
            raise NoExpression(f"unreadable at {text[place : place + 10]!r}")
        place = match.end()
        if match["repeating"]:
            tokens.append(("number", _repeating(match)))
        elif match["number"]:
            tokens.append(("number", Fraction(match["number"].replace(",", ""))))
        elif match["command"]:
            tokens.append(("command", match["command"]))
        elif match["letters"]:
            tokens += _letters(match["letters"])
        else:
            tokens.append(("sign", match["sign"].removeprefix("\\") if match["sign"] != "\\|" else "|"))
    return tokens


def _repeating(match: re.Match) -> Fraction:
    """`0.1\\overline{6}` and `0.\\dot{1}4285\\dot{7}` (first and last digit of the period are marked)."""
    start, digits = match["repeating"].split("\\", 1)[0].split("."), match["period"]
    if match["last"]:
        digits += match["last"]
    whole, before = start[0], start[1]
    shift = 10 ** len(before)
    return Fraction(int(whole)) + (Fraction(int(before or 0)) + Fraction(int(digits), 10 ** len(digits) - 1)) / shift


def _letters(run: str) -> list[tuple[str, Any]]:
    """A run of letters: a known word, or one symbol per letter. Longer unknown runs are words, not products."""
    for word in _WORDS:
        if run.lower() == word or (run.startswith(word) and len(run) == len(word) + 1):
            rest = run[len(word) :]
            return [("command", word), *(_letters(rest) if rest else [])]
    if len(run) > 3:
        raise NoExpression(f"{run!r} is a word")
    return [("letter", letter) for letter in run]


class _Parser:
    """Recursive descent. `place` is the next token."""

    def __init__(self, tokens: list[tuple[str, Any]]) -> None:
        self.tokens, self.place, self.depth = tokens, 0, 0

    def next(self) -> tuple[str, Any]:
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", None)

    def take(self, sign: str) -> bool:
        if self.next() == ("sign", sign):
            self.place += 1
            return True
        return False

    def want(self, sign: str) -> None:
        if not self.take(sign):
            raise NoExpression(f"{sign!r} is missing")

    def sum(self, end: str = "") -> Tree:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise NoExpression("nested too deep")
        terms = [self.product(end)]
        while self.next() in (("sign", "+"), ("sign", "-")):
            minus = self.next()[1] == "-"
            self.place += 1
            term = self.product(end)
            terms.append(("negative", term) if minus else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def product(self, end: str) -> Tree:
        tree = self.signed(end)
        while True:
            kind, value = self.next()
            if (kind, value) in (("sign", "*"), ("command", "cdot"), ("command", "times")):
                self.place += 1
                tree = ("multiply", tree, self.signed(end))
            elif (kind, value) in (("sign", "/"), ("command", "div")):
                self.place += 1
                tree = ("divide", tree, self.signed(end))
            elif self.starts_factor(end):
                tree = ("multiply", tree, self.power(end))
            else:
                return tree

    def starts_factor(self, end: str) -> bool:
        kind, value = self.next()
        if kind in ("number", "letter"):
            return True
        if kind == "command":
            return value not in ("cdot", "times", "div", "rfloor", "rceil", "rangle", "pm", "mp", "rvert")
        return kind == "sign" and value in "([{|" and value != end

    def signed(self, end: str) -> Tree:
        minus = False
        while self.next() in (("sign", "+"), ("sign", "-")):
            minus ^= self.next()[1] == "-"
            self.place += 1
        tree = self.power(end)
        return ("negative", tree) if minus else tree

    def power(self, end: str) -> Tree:
        tree = self.postfix(end)
        if self.take("^"):
            above = self.exponent(end)
            below = re.fullmatch(r"C_(\d{1,4})", tree[1]) if tree[0] == "symbol" else None
            tree = ("binomial", ("number", Fraction(below.group(1))), above) if below else ("power", tree, above)  # C_{10}^3
        while self.take("!"):
            tree = ("factorial", tree)
        return tree

    def exponent(self, end: str) -> Tree:
        if self.take("{"):
            tree = self.sum()
            self.want("}")
            return tree
        minus = self.take("-")
        tree = self.postfix(end)
        if self.take("^"):
            tree = ("power", tree, self.exponent(end))
        return ("negative", tree) if minus else tree

    def postfix(self, end: str) -> Tree:
        tree = self.atom(end)
        while True:
            if self.take("!"):
                tree = ("factorial", tree)
            elif self.take("%"):
                tree = ("divide", tree, ("number", Fraction(100)))
            elif self.take("°"):
                tree = ("degrees", tree)
            else:
                return tree

    def atom(self, end: str) -> Tree:
        kind, value = self.next()
        self.place += 1
        if kind == "number":
            return self.number(value)
        if kind == "letter":
            return self.symbol(value)
        if kind == "command":
            return self.command(value, end)
        pairs = {"(": ")", "[": "]", "{": "}"}
        if kind == "sign" and value in pairs:
            tree = self.sum()
            self.want(pairs[value])
            return tree
        if kind == "sign" and value == "|" and end != "|":
            tree = self.sum("|")
            self.want("|")
            return ("abs", tree)
        raise NoExpression(f"unexpected {value!r}")

    def number(self, value: Fraction) -> Tree:
        if self.next() == ("sign", "_"):  # 52_8: a numeral of another base is itself, not its digits in base ten
            return self.symbol(str(value))
        if self.next() == ("command", "frac") and value.denominator == 1 and self.tokens[self.place + 2 : self.place + 3]:
            part, mark = self.tokens[self.place + 2], self.place
            tree = self.atom("")
            if part[0] == "number" and tree[0] == "divide" and all(side[0] == "number" for side in tree[1:]):
                return ("add", ("number", value), tree)  # 2\frac{1}{2} is a mixed number
            self.place = mark
        return ("number", value)

    def symbol(self, name: str) -> Tree:
        if self.take("_"):
            name += "_" + self.raw()
        while self.take("'"):
            name += "'"
        return ("symbol", name)

    def raw(self) -> str:
        """The text of the next group or token, as part of a name."""
        if not self.take("{"):
            kind, value = self.next()
            if kind in ("end", "sign"):
                raise NoExpression("a name is cut off")
            self.place += 1
            return str(value)
        start = self.place
        while self.next()[0] != "end" and self.next() != ("sign", "}"):
            self.place += 1
        self.want("}")
        return "".join(str(value) for _, value in self.tokens[start : self.place - 1])

    def group(self) -> Tree:
        """The argument of a LaTeX command: `{...}`, or one token; `\\frac12` has been written out before."""
        if self.take("{"):
            tree = self.sum()
            self.want("}")
            return tree
        return self.atom("")

    def command(self, name: str, end: str) -> Tree:
        name = _SAME_FUNCTION.get(name, name)
        if name == "frac":
            above = self.group()
            return ("divide", above, self.group())
        if name in ("binom", "dbinom", "tbinom"):
            above = self.group()
            return ("binomial", above, self.group())
        if name == "sqrt":
            degree: Tree = ("number", Fraction(2))
            if self.take("["):
                degree = self.sum()
                self.want("]")
            return ("root", self.group(), degree)
        if name in _FUNCTIONS:
            return self.function(name, end)
        if name in ("lfloor", "lceil", "lvert"):
            close = {"lfloor": "rfloor", "lceil": "rceil", "lvert": "rvert"}[name]
            tree = self.sum()
            if self.next() != ("command", close):
                raise NoExpression(f"\\{close} is missing")
            self.place += 1
            return ({"lfloor": "floor", "lceil": "ceiling", "lvert": "abs"}[name], tree)
        if name in ("overline", "bar", "vec", "hat", "overrightarrow", "widehat", "tilde", "dot"):
            return ("symbol", f"\\{name}{{{self.raw()}}}")
        if name == "pi":
            return ("symbol", "\\pi")
        if name in ("infty", "infinity"):
            return ("symbol", "\\infty")
        if name == "emptyset":
            return ("symbol", "\\emptyset")
        if name in ("angle", "triangle"):
            letters = ""
            while self.next()[0] == "letter":
                letters += self.next()[1]
                self.place += 1
            return ("symbol", f"\\{name} {letters}")
        if name in _SYMBOLS:
            return self.symbol("\\" + name)
        raise NoExpression(f"\\{name} is not read here")

    def function(self, name: str, end: str) -> Tree:
        base: Tree | None = None
        power: Tree | None = None
        while self.next() in (("sign", "_"), ("sign", "^")):
            mark = self.next()[1]
            self.place += 1
            if mark == "_":
                base = self.group()
            else:
                power = self.exponent(end)
        if self.next() in (("sign", "("), ("sign", "{"), ("sign", "["), ("sign", "|")):
            argument = self.power(end) if self.next() != ("sign", "(") else self.postfix(end)
        else:
            argument = self.power(end)
            while self.starts_factor(end) and self.next()[0] in ("letter", "number", "command") and self.next()[1] not in _FUNCTIONS:
                argument = ("multiply", argument, self.power(end))
        if power == ("negative", ("number", Fraction(1))) and name in ("sin", "cos", "tan"):
            return ("arc" + name, argument)
        tree: Tree = ("log", argument, base) if base is not None else (name, argument)
        return tree if power is None else ("power", tree, power)
