"""What a sampler does between two network calls: a sum of states and noise with the step's coefficients."""
