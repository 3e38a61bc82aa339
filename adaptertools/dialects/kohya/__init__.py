"""What kohya's sd-scripts and LyCORIS share: keys, flat names, factors, and the header of their files."""
