"""The methods as llm-compressor and autoawq do them: selectable, and what our own are measured against."""
