"""Texts: documents, contamination, tokenizer rules."""
