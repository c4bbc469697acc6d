"""The ONNX Runtime custom op for CPUs: the C++ kernel, and where its library is found."""
