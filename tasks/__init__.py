"""The tasks of this pool, one file each: every module here is imported on the first need.

A new task is a new file with a class that inherits from Task; `noop.py` is the one to copy. It reads and imports
nothing of the house but `mqworker.task`, whose names are handed on here.
"""

from mqworker.task import FetchExecUploadMixin, Task, TaskConfigError, TaskContext, TaskRunCommandMixin

__all__ = ["FetchExecUploadMixin", "Task", "TaskConfigError", "TaskContext", "TaskRunCommandMixin"]
