"""The commands: compress a language model, lower it to ONNX, build an engine, validate it."""
