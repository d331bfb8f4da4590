"""Graphs for ONNX Runtime and OpenVINO: one trace of the model, written by each engine's own tools and run by it."""
