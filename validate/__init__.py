"""Is the engine still right, and is it really faster? Numerics, accuracy and latency against the dense engine."""
