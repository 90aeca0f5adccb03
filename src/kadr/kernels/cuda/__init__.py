"""For CUDA devices only: graphs, implementations of attention, the queue of kernels."""
