"""Sources to documents (corpus), documents to memory-mapped tokens (shards), tokens to batches (loader), baselines.

Imports numpy only; pyarrow and grain are imported where they are needed.
"""
