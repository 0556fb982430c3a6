"""GroupNorm with what surrounds it: embedding or residual before, scale, shift and SiLU after."""
