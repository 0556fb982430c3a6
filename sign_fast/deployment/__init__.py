"""Getting ready for GPUs that are elsewhere: which machine code networks need, read off the networks themselves."""
