"""Holds the tiny policy of the quickstart, a folder that benchmarks/make_quickstart.py makes."""

from pathlib import Path

TINY = str(Path(__file__).parent / "tiny")
