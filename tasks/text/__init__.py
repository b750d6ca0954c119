"""Texts as they come: documents, contamination, tokenizer rules."""
