"""python -m onnx_server MODEL_DIR: see the package."""

from .server import main

if __name__ == "__main__":
    main()
