"""The benchmark: jaxlm beside torchref on the same weights and batches; `experiments.benchmark` is its entry point.

timing, machine <- side <- train, serve, layers, host, probes, numerics <- cases <- worker
results (rows, tables), budget (processes and the clock) need neither framework
"""
