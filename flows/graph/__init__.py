"""Read dvc.yaml, params.yaml and dvc.lock and decide what to run; nothing here runs a stage."""
