"""Widgets: the panels of a training under a timeline, and the runs of a folder to choose from."""
