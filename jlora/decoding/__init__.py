"""Beam search, greedy decoding and sampling, and predictions."""
