"""Folders for programs without eckart: stock transformers, vLLM, ONNX Runtime, OpenVINO."""
