"""Trainable layers beside frozen ones, and the tensors they are made of."""
