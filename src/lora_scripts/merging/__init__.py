"""LoRA files added into the weights of their base model for good."""
