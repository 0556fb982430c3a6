"""`python -m sign_fast.cli` is `sign-fast`."""

from .main import main

main()
