"""Data, models, objectives, the learner and its runs on disk."""
