"""Records of a run: MLflow, the model registry, Prefect's artifacts."""
