"""Other projects' pipelines and networks on sign_fast's operations; nothing of theirs is imported until it is used."""
