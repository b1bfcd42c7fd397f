"""CrossPool: KV cache of all models in one pool of devices, FFN weights of all models in another (arXiv 2606.24506)."""
