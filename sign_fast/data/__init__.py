"""Data sets of images with optional class labels, and the order in which training reads them."""

from .datasets import ArrayDataset, Dataset, ImageFolderDataset, open_dataset
from .order import BatchLoader, indices_at

__all__ = ["ArrayDataset", "BatchLoader", "Dataset", "ImageFolderDataset", "indices_at", "open_dataset"]
