"""math-verify's opinion on what the readers of this package do not know, behind a guard on size.

sympy computes `9^{9^{9^9}}` or one million factorial while it reads them: such a text is refused before it gets there, in
microseconds instead of a worker's time limit. math-verify's own time-outs are off: they use `signal.alarm`, and the sandbox
around this code has the limit.
"""

from __future__ import annotations

import logging
import re

from terrace.rewards.rules.latex import plain

MOST_CHARACTERS = 500
_LARGE_POWER = re.compile(r"\^\s*\{?\s*-?\d{4,}|\^[^}]{0,40}\^[^}]{0,40}\^|\*\*")
_LARGE_FACTORIAL = re.compile(r"\d{4,}\s*\}?\s*!|!\s*!|\)\s*!|\\d?t?binom\s*\{[^{}]*(?:\^|\d{5,})")
_HEAVY = re.compile(r"\\(?:i+nt|oint|sum|prod|lim)(?![a-z])")


def too_large(text: str) -> bool:
    """Whether sympy might not come back from reading this text."""
    if _HEAVY.search(text) and re.search(r"\d{3,}|\^\s*\{[^{}]*\^|10\s*\^", text):
        return True
    return len(text) > MOST_CHARACTERS or bool(_LARGE_POWER.search(text) or _LARGE_FACTORIAL.search(text)) or text.count("^") > 40


def verified(gold: str, text: str) -> bool:
    """math-verify's verdict; a text that is too large, or an integral or sum left standing where the solution has none, is wrong."""
    if re.sub(r"\s", "", plain(gold)) == re.sub(r"\s", "", plain(text)):
        return True
    if too_large(gold) or too_large(text) or (_HEAVY.search(text) and not _HEAVY.search(gold)):
        return False
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    wanted, said = (parse(f"\\boxed{{{one}}}", parsing_timeout=None) for one in (gold, text))
    return bool(verify(wanted, said, timeout_seconds=None))
