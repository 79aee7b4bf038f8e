"""What happens: pure functions on tensors and dicts; no Lightning, no global random state."""
