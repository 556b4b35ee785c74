"""What every package may use: console, files, processes, and what is installed beside them. Nothing here knows a run."""
