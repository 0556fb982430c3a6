"""Distilling text-to-image pipelines of diffusers into one- and few-step ones (SPEC, section 6)."""
