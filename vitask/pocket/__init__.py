"""The embedded small VLM: its making, weights and tokenizer."""

from pathlib import Path

POCKET = Path(__file__).parent / "weights"  # a folder of transformers, like any other checkpoint
SEED = 0
