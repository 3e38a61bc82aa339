"""LitGPT: keys of its adapters, Hugging Face's names for its modules, and the slots of its fused projection."""
