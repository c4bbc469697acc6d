"""The commands: compress a language model, lower it to ONNX, build an engine, validate it."""

__version__ = "0.1.0"
