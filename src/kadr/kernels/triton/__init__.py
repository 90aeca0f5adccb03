"""The operations of `reference` as Triton kernels, under the same names: what they share is in `rows`.

Nothing here is imported before a kernel is wanted: triton is no dependency of its own, but comes with torch for CUDA.
"""
