"""What the format gguf is made of: model families, names, the order of rows, and the keys of the header."""
