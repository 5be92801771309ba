"""Prompts to pictures: WebUI syntax, LoRA weights, grids."""
