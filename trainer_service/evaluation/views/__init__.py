"""The views of a report: terminal, Markdown and HTML. They know documents, and nothing of records."""
