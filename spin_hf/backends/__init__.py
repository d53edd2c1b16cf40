"""How a step is computed: the PyTorch reference, or Triton kernels."""
