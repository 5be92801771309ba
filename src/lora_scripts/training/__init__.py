"""The loop and what it is made of: draws, optimizers, schedules, checkpoints, events."""
