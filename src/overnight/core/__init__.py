"""What every package may use: console, files, processes. Nothing here knows of a run."""
