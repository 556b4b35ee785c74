"""One training: set up, its steps, its log, how it stops and ends."""
