"""Runs a model token by token: decoders for each device, spans, and sampling."""
