"""Flax: trees of every dialect, name maps, packed and scanned leaves, and the sidecar."""
