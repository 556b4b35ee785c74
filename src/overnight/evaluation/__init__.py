"""The question after a run, whether a model beats another one: losses, benchmarks, and what the difference is worth."""
