"""Machine code compiled ahead of time: which variants, how packs of them are built, stored, found and launched."""
