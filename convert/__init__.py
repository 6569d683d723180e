"""The bridge between the twins: the only library package that imports both frameworks.

tree      parameters as a flat {dotted path: array}
rules     pairs of paths with an invertible transform; one report of everything that does not fit
native    jaxlm <-> torchref
optstate  optimizer state across frameworks: a run started in one continues in the other
parity/   are they the same model? rungs from the configuration to decoded tokens, in float64, float32 and bfloat16
"""
