"""Overnight: pretrain a small GPT-2 on one GPU in one night, and know what came out."""

__version__ = "0.1.0"
