"""Tasks: where prompts and their right answers come from (see `task.py`)."""

from qerl_compile.rl.tasks.task import Row, Task, columns, parse_task

__all__ = ["Row", "Task", "columns", "parse_task"]
