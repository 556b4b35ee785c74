"""From text to token shards: sources, workers over files, deduplication and the split."""
