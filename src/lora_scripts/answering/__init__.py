"""What a language model says: answers to prompts, whole or piece by piece, and signs that something is wrong with them."""
