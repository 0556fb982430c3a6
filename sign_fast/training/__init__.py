"""Training of teachers: EDM's losses, EMA, schedules, checkpoints and logs; `sign_fast.distill` builds on its parts."""
