"""loralib: keys, slots of fused projections, and the record of what a file cannot say."""
