"""The stages of the pipeline, each a small program. Imports no Prefect, DVC or MLflow."""
