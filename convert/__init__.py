"""The bridge between the twins: the only library package that imports both frameworks.

tree      parameters as a flat {dotted path: array}
rules     pairs of paths with an invertible transform; one report of everything that does not fit
native    jaxlm <-> torchref
parity/   are they the same model? float64 agreement of activations, loss, gradients, optimizer and decoding
"""
