"""A pretended CUDA device beside a real host, in a CUDA build of torch on a machine without its driver.

Tensors on ``cuda`` have shapes, dtypes and devices, but no values (`FakeTensorMode`); host tensors are real. Mixing
the two raises as on a GPU, and every copy and read between them is noted with the line of fewstep that asked for it.
What it does not show: the kernels and their numbers, NCCL, memory. Attention takes its unfused path, and convolutions
cuDNN's. torch is changed for the rest of the process, so it is used in one of its own (`python -m tests.fake_cuda`).
"""
