"""The command line, `sign-fast`; nothing else in the library parses arguments."""
