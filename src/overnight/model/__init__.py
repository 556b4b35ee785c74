"""The model and all that changes or keeps its weights: attention, loss, optimizers, checkpoints, export."""
