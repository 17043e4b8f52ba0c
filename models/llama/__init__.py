"""The Llama 3 family (arXiv 2407.21783)."""
