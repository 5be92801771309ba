"""Base model files: what they are, whether they are whole, and how they are loaded."""
