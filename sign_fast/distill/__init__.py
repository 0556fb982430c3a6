"""Distillation of a denoising teacher into a one- or few-step student: SiD, SiDA, few-step SiD and SIGN."""
