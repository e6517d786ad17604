"""Trains any task with any optimizer: tasks, optimizers, batches, the loop, run folders, progress."""
