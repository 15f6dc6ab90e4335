"""Schedules of students: one small file each, found by its name (``state_adaptive.py`` is ``state-adaptive``)."""
