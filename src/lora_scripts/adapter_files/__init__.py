"""Adapter files of every spelling: what they are, their layers one by one, who reads them, and other spellings of them."""
