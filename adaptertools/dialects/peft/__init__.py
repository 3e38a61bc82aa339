"""PEFT: configuration, key grammar, layouts of layers, and what stands where in a folder."""
