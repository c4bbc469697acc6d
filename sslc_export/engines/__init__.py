"""Engines that run: ONNX Runtime on CPUs, PyTorch as the reference, and text generation on any of them."""
