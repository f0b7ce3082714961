"""Thin adapters to RAG frameworks; importing this package imports none of them."""
