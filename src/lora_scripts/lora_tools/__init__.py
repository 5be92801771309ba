"""What can be done with finished LoRA files: added up, made smaller, taken from two checkpoints, turned into plain ones."""
