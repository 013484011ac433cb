"""The torture set of the rule rewards, grouped by what it attacks; test_rewards.py asserts how many cases there are."""

from .monsters import FORMS, MONSTERS
from .places import BOXES, POINTS, SPANS
from .texts import CHOICES, COUNTS, LATEX, PLAIN_NUMBERS, TOLERANCE, WORDS

CASES = LATEX + PLAIN_NUMBERS + TOLERANCE + CHOICES + WORDS + COUNTS + BOXES + POINTS + SPANS + FORMS + MONSTERS
