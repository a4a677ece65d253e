"""Triton kernels over kvserve's pages: the same bytes as the CPU kernels (csrc/), on a GPU.

`geometry` says what a kernel knows at compile time; `codecs` reads and writes what is inside a page, and `sealed`
attends to it. With `pages`, `encode` and `softmax` these are the parts that kernels share, and each other file is one
kernel with its launcher: `store`, `decode`, `extend`, `kept` (read, kept pages), `scores`.
kvserve/attention/triton.py puts them behind the PagedAttention interface. Nothing here imports vLLM.
"""
