"""The target `onnx`: a directory for ONNX Runtime GenAI."""
