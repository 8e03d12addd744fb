"""How a pipeline is placed and made fast: loading, plans of memory, fused passes."""
