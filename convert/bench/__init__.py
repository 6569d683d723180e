"""The benchmark: jaxlm beside torchref on the same weights and batches; `experiments.benchmark` is its entry point.

cases (what), results (rows, tables), runner (processes and the clock) need neither framework
worker (a process) -> train, losses, serve, layers, kernels, host, probes, numerics -> side -> timing, machine
torch_parts: what a fair side of PyTorch needs beyond torchref
"""
