"""The folder of a run: what lies where in it, who works in it, and its log."""
