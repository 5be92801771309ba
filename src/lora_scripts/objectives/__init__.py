"""Training objectives as pure functions: noise, targets, weights."""
