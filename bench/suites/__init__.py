"""The suites: one file each, and its page of prose."""
