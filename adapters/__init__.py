"""LoRA adapters on a frozen base model: read, keep, place and apply them.

A library: torch, safetensors, numpy and regex; nothing of HTTP, requests or tokenisation. A file imports only what
stands above it here: errors, patterns, config, layout, adapter, labels, head_placement, placement, memory, arena,
adalora, checkpoint, batch, kernels, dora, slots, packed, products, layers, heads, version, host_tier, device_tier,
registry, directory, database, version_files, store, catalog, merge.
"""
