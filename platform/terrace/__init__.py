"""Terrace trains vision-language models through a curriculum of stages on Ray."""
