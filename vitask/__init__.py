"""VITask: task-specific visual instruction tuning of vision language models."""
