"""Published EDM, SiD and SiDA snapshots: pickles, read without running anything that they carry."""

from .snapshot import DEFAULT_KEY, SUFFIXES, PublishedNetwork, read_snapshot

__all__ = ["DEFAULT_KEY", "SUFFIXES", "PublishedNetwork", "read_snapshot"]
