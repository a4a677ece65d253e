"""Triton kernels over kvserve's pages: the same bytes as the CPU kernels (csrc/), on a GPU.

`geometry` says what a kernel knows at compile time, `pages` and `softmax` are the parts that kernels share, and each
other file is one kernel with its launcher: `store`, `decode`, `extend`, `kept` (read, kept pages), `scores`.
kvserve/attention/triton.py puts them behind the PagedAttention interface. Nothing here imports vLLM.
"""
