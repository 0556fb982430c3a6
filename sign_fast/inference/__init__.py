"""Inference copies of networks: a network as a flat list of operations, folded once and run many times."""
