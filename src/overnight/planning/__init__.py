"""What a run costs and reaches, before it runs: memory, speed, losses by budget."""
