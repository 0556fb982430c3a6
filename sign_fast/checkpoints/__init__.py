"""Weights on disk: safetensors folders, bundled networks, resumable training state."""
