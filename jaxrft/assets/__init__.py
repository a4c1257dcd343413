"""The tiny policy of the quickstart, a Hugging Face folder, and the program that made it."""

from pathlib import Path

TINY = str(Path(__file__).parent / "tiny")
