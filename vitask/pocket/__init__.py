"""The embedded small VLM: how it is made, its weights and tokenizer."""

from pathlib import Path

POCKET = Path(__file__).parent / "weights"  # a transformers folder, as any other checkpoint
SEED = 0
