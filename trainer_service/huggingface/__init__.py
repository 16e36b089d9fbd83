"""Reads and writes GPT-2 in Hugging Face's layout."""
