"""What a finished model is published with: its card and its curve."""
