"""diffusers: key grammar, lora_adapter_metadata, which file of a folder, and the names of Flux."""
