"""What runs: plans, keys, jobs, records, models."""
