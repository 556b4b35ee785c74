"""Everything that gives a run its meaning: a recipe's keys, how a file of them is read, its learning rates."""
