"""The device that computes: its memory, power and precision, and what happens to it."""
