"""Suites, generation and metrics."""
