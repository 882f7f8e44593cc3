"""The four-condition evaluation: questions, models and metrics."""
