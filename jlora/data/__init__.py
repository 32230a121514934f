"""Texts from files and datasets, and token batches with loss masks."""
