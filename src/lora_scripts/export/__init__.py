"""LoRA files as other programs read them, and the proof that they can."""
