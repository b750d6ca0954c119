"""An OpenAI-compatible HTTP server for exports of the target onnx (ONNX Runtime GenAI, on a CPU).

    python -m tasks.serving.onnx_server exports/awq-int4 --port 8000

The package imports nothing of this project, so a copy of the folder runs where only requirements.txt is installed:

    python -m onnx_server MODEL_DIR
"""
