"""From a (compressed) Hugging Face folder to ONNX: trace, one custom op per layer, weights as byte ranges."""
