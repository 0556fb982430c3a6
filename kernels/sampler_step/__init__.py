"""What happens between two network calls: preconditioning, re-noising, conversion to uint8."""
