"""torchtune: keys of raw adapter files, and how each family of models stores the rows that rotary embeddings turn."""
