"""The losses of score distillation: student (generator) and fake score."""
