"""Data sets of images with optional class labels, and the order in which training reads them."""

from .datasets import ArrayDataset, Dataset, ImageFolderDataset, open_dataset
from .order import BatchLoader, in_range, indices_at, one_hot

__all__ = [
    "ArrayDataset",
    "BatchLoader",
    "Dataset",
    "ImageFolderDataset",
    "in_range",
    "indices_at",
    "one_hot",
    "open_dataset",
]
