"""Rows of dialogues or text become tokens that are marked as trained or not."""
