"""Batch schedulers: what a job needs that runs below one, and what it tells it."""
