"""Token shards: their format, their checksums, and the batches that are cut from them."""
