"""Editing with a time-free student: a corrupted image is projected back to what the student knows (SIGN)."""

from .constraints import KnownPixels, Luma, PatchMeans
from .controls import sdedit
from .corruptions import AddedNoise, Blur, Edges
from .evaluate import Evaluation, Score, evaluate, psnr
from .projection import noise_levels, project
from .tasks import TASKS, Task, make_task

__all__ = [
    "TASKS",
    "AddedNoise",
    "Blur",
    "Edges",
    "Evaluation",
    "KnownPixels",
    "Luma",
    "PatchMeans",
    "Score",
    "Task",
    "evaluate",
    "make_task",
    "noise_levels",
    "project",
    "psnr",
    "sdedit",
]
