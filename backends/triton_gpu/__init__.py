"""NVIDIA GPUs: the quantized graph as one that runs packed low-bit weights through kernels of our own."""
