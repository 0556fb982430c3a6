"""How good images are: Fréchet distance on the features of a classifier."""
