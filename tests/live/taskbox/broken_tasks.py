"""A module of tasks that does not import."""

raise ImportError("this module is broken on purpose")
