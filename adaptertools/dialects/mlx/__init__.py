"""What the files of mlx-lm hold: names, configuration, experts, and the record that our own carry in their header."""
