"""The work: every stage of the pipeline as a small program. Imports no Prefect, no DVC, no MLflow."""
