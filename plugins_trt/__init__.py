"""The GPU side: weights packed for the fused CUDA kernel, and the TensorRT plugin that runs it."""
