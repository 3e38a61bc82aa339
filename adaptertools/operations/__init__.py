"""Adapter(s) in, Adapter out; one file each."""
