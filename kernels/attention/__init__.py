"""Self-attention over (B·heads, T, d)."""
