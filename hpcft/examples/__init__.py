"""Trainings to start from, and what the demonstration runs."""
