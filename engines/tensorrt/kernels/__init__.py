"""The experts on NVIDIA GPUs: Triton kernels, compiled ahead of time."""
