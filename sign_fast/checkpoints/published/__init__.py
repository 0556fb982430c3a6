"""Published EDM, SiD and SiDA snapshots: pickles, read without running anything that they carry."""

from .snapshot import SUFFIXES, PublishedNetwork, read_snapshot

__all__ = ["SUFFIXES", "PublishedNetwork", "read_snapshot"]
