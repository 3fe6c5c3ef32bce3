"""The measuring: suites, metrics, statistics, records and leaderboards. `python -m bench`."""
