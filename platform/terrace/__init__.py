"""Terrace trains vision-language models through a curriculum of stages on Ray."""

__version__ = "0.1.0"  # the only place: the wheel, `terrace --version` and the Python package read it here
