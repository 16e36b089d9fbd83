"""The contracts of proto/ as Python, made by `make proto`."""
