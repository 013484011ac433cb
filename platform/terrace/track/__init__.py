"""MLflow, progress and the report."""
