"""The operations of `reference` as Triton kernels, under the same names; `common` has what they share.

Nothing here is imported before a kernel is needed: triton is not a dependency of kadr, but comes with torch for CUDA.
"""
