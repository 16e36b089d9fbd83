"""The second face of the server: OpenAI's completions and the page, over HTTP."""
